"""One command that measures everything on one CUDA GPU, in minutes, and needs no network.

    python -m tests.gpu out=<folder> minutes=9
    python -m tests.gpu out=<folder> --dry-run        the same on a CPU, at tiny sizes: its figures mean nothing

    wheels=<folder>     wheels (*.whl) of packages that the machine lacks: faiss-cpu, omegaconf, simplejpeg, timm ...
    cifar10=<zip or folder with train/ and test/>     default: cifar10.zip in this checkout, else fractals
    only=golden,steps   jobs whose names begin so
    fail=golden:raise,tests:kill,steps:hang           artificial failures, for rehearsals

Start it in the root of the checkout. Each job has a process of its own and a share of the time. The time that it leaves
goes to those after it. One that fails, hangs or takes too long is ended, and the others go on. What it has found by
then stays. `out` holds report.json, report.md (tables), log.txt and traces for chrome://tracing or Perfetto. The
exit status is 0 if every job ended well.
"""
