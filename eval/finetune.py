"""Fine-tuning: the whole encoder and a linear head, trained on labelled images by a published recipe.

    accelerate launch eval/finetune.py run=<run> data.train=<labelled images> data.test=<labelled images>

Protocol: recipe=mae is He et al., appendix A.2 (strong augmentation, layer-wise learning rates, mean of the patches);
recipe=small is for little data (weak augmentation, the head first, then one block after the other). The weights after
the last epoch see the test images once; nothing is chosen by them. labels_share=0.01 takes a hundredth of the labels of
each class, seeds=[0,1,2] repeats. The same as `sslvit finetune`; `--help` lists the keys.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
