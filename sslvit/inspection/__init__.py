"""What an encoder has learned, block by block: a table, and one page that needs nothing else.

Parts of the page, each with a sentence that says how to read it and what a healthy encoder shows:

k-NN         which block has the best features: each image is classified by its 20 nearest among all the others (DINO,
             section 4.1), if the images have labels
rank         effective rank and singular values of the features of each block, minus their mean (RankMe, arXiv
             2210.02885)
attention    mean distance and entropy of each head (Dosovitskiy et al., ICLR 2021, figure 7), and rollout (Abnar and
             Zuidema, arXiv 2005.00928), on 256 images
norms        of the patch tokens of each block: artefact tokens, and whether registers are wanted (Darcet et al., arXiv
             2309.16588)
CKA          similarity of blocks, and with other= of two encoders (Nguyen et al., arXiv 2010.15327)
filters      principal components of the patch embedding, and similarity of the positions (Dosovitskiy et al., figure 7)

Features are pooled as pool= says and taken after the final norm; blocks count from 0. Memory does not grow with the
number of images. k-NN takes 5,000 of them at most. Of a model that is no plain ViT the stages are shown, and a sentence
says what is left out. The numbers are also written to <run>/eval/inspect.json.

collect.py measures an encoder with measures.py, page.py draws with drawing.py. May import report, evaluation, data and
what is below.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import pretrained, rng
from ..arguments import flatten, read_yaml
from ..data import Source
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from ..evaluation import pictures, records
from ..evaluation.classes import labels_of
from ..evaluation.config import Inspect as Config
from ..evaluation.features import CentreCropped, batches
from ..evaluation.frozen import Frozen, load_frozen
from ..evaluation.subset import Subset
from ..report import check_out, write
from ..report.pictures import SIDE, local, on_image
from .collect import Findings, Meter
from .measures import OUTLIER, Cka
from .page import Result, header, html, png, rows_of, sentences


def run(config: Config) -> dict[str, Any]:
    """Look at one encoder or two, print a table, write the page and <run>/eval/inspect.json. Raises UserError."""
    check_range("", config, 8, None, "images")
    out = Path(config.out).expanduser()
    picture = out.suffix.lower() == ".png"
    pictures.check(config.out) if picture else check_out(out, config.out)
    loaded = [_load(config, name) for name in (config.run, config.other)[: 2 if config.other else 1]]
    result = on_first_process(lambda: _look(config, loaded))
    for one in result.found:
        say(f"{one.name}: {one.what} of each {one.unit}, {one.images:,} images")
        if one.images:
            say(*records.table(header(one), rows_of(one)))
        say(*sentences(one))
    say(*result.left_out)
    numbers = _numbers(result)
    if loaded[0].subject.results:
        loaded[0].save("inspect", numbers, data=result.spec)
    if picture:
        pictures.save(on_first_process(lambda: png(result)), config.out)
    else:
        on_first_process(lambda: write(out, html(result)))
        say(f"written to {config.out}")
    return numbers


def _load(config: Config, name: str) -> Frozen:
    """image_size, value_range and model_args count for timm: and random:, if one of the two encoders is such."""
    takes = [one.startswith(("timm:", "random:")) for one in (name, config.run, config.other)]
    if any(takes) and not takes[0]:
        config = replace(config, image_size=None, value_range=None, model_args={})
    return load_frozen(replace(config, run=name, out=""))


def _look(config: Config, loaded: Sequence[Frozen]) -> Result:
    meters, left_out = [Meter(one) for one in loaded], []
    try:
        spec = config.data or _own_images(loaded[0])
    except UserError as error:
        spec = ""
        left_out.append(f"There is nothing that needs images: {error}")
    sources = [_some_of(one.open(spec), config) for one in loaded] if spec else []
    across = _measure(config, loaded, meters, sources)
    for meter, source in zip(meters, sources, strict=bool(sources)):
        meter.finish(labels_of(source), len(source.classes))
    found = [meter.found for meter in meters]
    if spec and not found[0].images:
        raise UserError(f"None of the {len(sources[0])} images of {spec} can be read.")
    if sources and found[0].images < len(sources[0]):
        left_out.append(f"{len(sources[0]) - found[0].images} of {len(sources[0])} images cannot be read.")
    rows, names, titles = _samples(loaded[0], found, sources)
    left_out += dict.fromkeys(sentence for one in found for sentence in one.left_out)
    return Result(found, across, spec, rows, names, titles, left_out)


def _some_of(source: Source, config: Config) -> Source:
    """In a random order: CKA is a mean over batches, and a batch of one class has other similarities than all images.
    The first images also stand for the attention of all."""
    return Subset(source, rng.permutation(rng.fold_in(config.seed, "inspect"), len(source))[: config.images])


def _own_images(frozen: Frozen) -> str:
    """Those that a run was trained on. Raises UserError if they are not on this machine."""
    results = frozen.subject.results
    where = pretrained.root_of(results) / "config.yaml" if results else None
    if where is None or not where.is_file():
        raise UserError("give data=<folder>, since an encoder of this kind does not say on what it was trained.")
    return local(where.parent, flatten(read_yaml(where)))


def _measure(
    config: Config, loaded: Sequence[Frozen], meters: Sequence[Meter], sources: Sequence[Source]
) -> Tensor | None:
    """All images pass each encoder once. Returns CKA between the blocks of two encoders."""
    across = Cka()
    streams = [
        batches(one.encoder, source, one.normalize, one.accelerator, config.batch_size, config.workers,
                torch.arange(len(source)))
        for one, source in zip(loaded, sources, strict=bool(sources))
    ]  # fmt: skip
    for parts in zip(*streams, strict=True):
        if not all(torch.equal(numbers, parts[0][0]) for numbers, _ in parts):
            raise UserError("The two encoders cannot read the same images: give images that both can read.")
        features = [meter.add(*part) for meter, part in zip(meters, parts, strict=True)]
        if len(features) == 2:
            across.add(*features)
    return across.value() if len(sources) == 2 else None


def _samples(
    frozen: Frozen, found: Sequence[Findings], sources: Sequence[Source]
) -> tuple[list[list[Image.Image]], list[str], list[str]]:
    """Rows of pictures with their names, and titles of the columns: images, rollouts, and norms in the last block."""
    shown = [one for one in found if one.samples]
    if not shown:
        return [], [], []
    titles, rows, names = ["the image"], [], []
    for one in shown:
        of = f", {one.name.rstrip('/').rsplit('/', 1)[-1]}" * (len(found) > 1)
        titles += [f"rollout{of}", f"norms{of}"]
    for places in zip(*(one.samples for one in shown), strict=False):
        number = places[0][0]
        pixels = CentreCropped(sources[0], torch.tensor([number]), frozen.encoder.image_size)[0][1]
        assert pixels is not None
        image = pictures.image_of(pixels, pictures.cell_size(frozen.encoder.image_size, SIDE), smooth=True)
        row = [image]
        for one, (_, rolled, norms) in zip(shown, places, strict=True):
            shares = norms / (OUTLIER * one.norms[-1][1])
            row += [on_image(image, rolled), pictures.image_of(pictures.viridis(shares), (image.height, image.width))]
        rows.append(row)
        names.append(sources[0].name(number)[-200:])
    return rows, names, titles


def _numbers(result: Result) -> dict[str, Any]:
    """JSON values."""
    numbers: dict[str, Any] = {"encoders": []}
    for one in result.found:
        rows = [dict(zip(header(one), row, strict=True)) for row in rows_of(one)]
        record = {"run": one.name, "features": one.what, "images": one.images, "in_short": sentences(one)}
        numbers["encoders"].append(
            {**record, f"{one.unit}s": rows, "cka": _rounded(one.cka), "heads": _rounded(one.heads)}
        )
    return numbers | {"cka": _rounded(result.across)}


def _rounded(values: Tensor | None) -> Any:
    """Lists of JSON numbers; None where nothing was measured."""
    return None if values is None else values.nan_to_num().mul(1e4).round().div(1e4).tolist()
