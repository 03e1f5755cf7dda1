"""Files that nobody should trust: whatever is in them, the user sees one sentence, soon, and the memory stays.

Some hundred cases in the ordinary suite, thousands by `python -m pytest -m slow tests/test_fuzz.py`.
"""

import io
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from sslvit import arguments, config, pretrained
from sslvit.__main__ import main
from sslvit.checkpoints import state
from sslvit.data.sources.decode import BadImage, decode
from sslvit.errors import UserError

from . import hostile, processes
from .conftest import words

SECONDS = 20  # of one case, on a machine that does other things as well
MEMORY = 1 << 30  # bytes that one case may take
few = pytest.mark.parametrize("cases", [25, pytest.param(350, marks=pytest.mark.slow)])


class Late(BaseException):
    """Not an Exception, which the code under test may catch."""


@contextmanager
def bounded() -> Iterator[None]:
    """No case takes longer, or leaves more memory taken."""

    def late(number: int, frame: object) -> None:
        raise Late(f"more than {SECONDS} s")

    before = psutil.Process().memory_info().rss
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert psutil.Process().memory_info().rss - before < MEMORY


def each(strategy, cases: int, check) -> None:
    """`check` on so many drawn cases, the same ones every time."""

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(case) -> None:
        with bounded():
            check(case)

    run()


KEYS = [
    *arguments.flatten(config.OmegaConf.structured(config.load(["method=dino"]))),
    "optim",
    "model.args",
    "objective",
    "x",
]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), st.text(max_size=20),
    st.sampled_from(["auto", "null", "${seed}", "${nowhere}", "${out}", "???", "mae", "../..", "1e400", "0x10"]),
    st.sampled_from(["\0", "{", "${"]),
)  # fmt: skip
NESTED = st.recursive(
    VALUES,
    lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.text(max_size=8), v, max_size=4)),
    max_leaves=8,
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(9 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = st.one_of(
    st.text(max_size=200),
    st.binary(max_size=200),
    st.dictionaries(st.sampled_from(KEYS), NESTED, max_size=5).map(lambda d: yaml.safe_dump(d)),
    st.lists(st.tuples(st.sampled_from(KEYS), NESTED), max_size=4).map(
        lambda pairs: "\n".join(f"{key.replace('.', ': {')}: {value!r}{'}' * key.count('.')}" for key, value in pairs)
    ),
    st.sampled_from(
        [
            BOMB, "a: &a [*a]", "optim: &o {base_lr: 1, x: *o}",
            "!!python/object/apply:os.system ['touch /tmp/sprung']",
            "out: !!python/name:os.system", "out: !!binary aGk=", "seed: !!int x", "--- 1\n--- 2", "? [a]\n: 1", "1: 2",
            "model: {args: {a: {b: {c: [1, {d: 2}]}}}}", "method: [mae]", "method: {a: 1}", "<<: {seed: 1}", "<<: 3",
            "seed: 2001-01-01", "eval: null", "optim: 3", "objective: null", "data: []", "epochs: .nan",
            "\ufeffseed: 1",
        ]
    ),
    st.integers(1, 3000).map(lambda n: "a: " + "[" * n),
    st.integers(1, 3000).map(lambda n: "a: " + "[" * n + "]" * n),
    st.integers(1, 1500).map(lambda n: "{a: " * n + "1" + "}" * n),
)  # fmt: skip


@few
def test_recipes(tmp_path, cases):
    path = tmp_path / "recipe.yaml"

    def check(text: str | bytes) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        with suppress(UserError):
            loaded = config.load([str(path)])
            config.check(loaded)
            config.make_plan(loaded, 1000, 1, 0)

    each(TEXTS, cases, check)
    assert not Path("/tmp/sprung").exists()


@few
def test_words(cases):
    def check(given: list[tuple[str, object]]) -> None:
        with suppress(UserError):
            loaded = config.load([f"{key}={value}" for key, value in given])
            config.check(loaded)
            config.make_plan(loaded, 1000, 1, 0)

    each(st.lists(st.tuples(st.sampled_from(KEYS), NESTED), min_size=1, max_size=3), cases, check)


def encoded() -> list[bytes]:
    """One picture in every common form."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    files = []
    for kind, mode, options in [
        ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "1", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}), ("GIF", "P", {}),
        ("TIFF", "RGB", {}), ("TIFF", "L", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "jpeg"}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("PPM", "RGB", {}),
        ("ICO", "RGBA", {}),
    ]:  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind, **options)
        files.append(file.getvalue())
    return files


@st.composite
def mutated(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(encoded())))
    for _ in range(draw(st.integers(1, 8))):
        place = draw(
            st.integers(0, min(len(data) - 1, 80) if draw(st.booleans()) else len(data) - 1)
        )  # headers matter most
        match draw(st.sampled_from(["byte", "bits", "ones", "cut", "repeat", "drop"])):
            case "byte":
                data[place] = draw(st.integers(0, 255))
            case "bits":
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "ones":
                data[place : place + 4] = b"\xff" * len(data[place : place + 4])
            case "cut":
                del data[max(1, place) :]
            case "repeat":
                data[place:place] = data[place : place + 50]
            case "drop":
                del data[max(1, place) : place + draw(st.integers(1, 20))]
    return bytes(data)


@few
@pytest.mark.filterwarnings("ignore")
def test_images(cases):
    def check(case: tuple[bytes, int]) -> None:
        data, channels = case
        with suppress(BadImage):
            image = decode(data, channels)
            assert image.shape[0] == channels
            assert image.dtype in (torch.uint8, torch.float32)

    each(st.tuples(st.one_of(mutated(), st.binary(max_size=100)), st.sampled_from([1, 2, 3, 4])), 3 * cases, check)


HEADERS = st.one_of(
    st.binary(max_size=64),
    st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + b"{}"),
    st.builds(
        lambda dtype, shape, offsets: (lambda h: len(h).to_bytes(8, "little") + h + bytes(64))(
            json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
        ),
        st.sampled_from(["F32", "F64", "I64", "BOOL", "X", "F8_E4M3", ""]),
        st.lists(st.one_of(st.integers(0, 20), st.integers(-5, 2**70)), max_size=5),
        st.one_of(st.just([0, 64]), st.lists(st.integers(-5, 2**64), min_size=2, max_size=2)),
    ),
)


@few
def test_checkpoints_whose_checksums_are_right_and_whose_content_is_not(colour_run, tmp_path, cases):
    run_dir = tmp_path / "run"
    folder = state.folder_of(run_dir, 8)
    folder.mkdir(parents=True)
    (run_dir / "config.yaml").write_bytes((colour_run / "config.yaml").read_bytes())
    whole = state.folder_of(colour_run, state.steps_saved(colour_run)[-1])
    record = json.loads((whole / state.STATE).read_text())

    def check(case: tuple[bytes, object]) -> None:
        content, changes = case
        (folder / state.MODEL).write_bytes(content)
        text = json.dumps(record | changes if isinstance(changes, dict) else changes)
        (folder / state.STATE).write_text(text)
        sums = "".join(f"{state._checksum(folder / name)}  {name}\n" for name in (state.MODEL, state.STATE))
        (folder / state.SUMS).write_text(sums)
        with pytest.raises(UserError):
            pretrained.load(str(run_dir))

    changes = st.one_of(st.just({}), NESTED, st.dictionaries(st.sampled_from([*record, "format"]), NESTED, max_size=2))
    whole_model = (whole / state.MODEL).read_bytes()
    each(st.tuples(HEADERS, changes), cases, check)
    (folder / state.MODEL).write_bytes(whole_model)

    for changes in (
        {"encoder": 3},
        {"encoder": {"prefix": 1, "pool": "mean"}},
        {"encoder": {}},
        {"encoder": None},
        [],
        3,
    ):
        check((whole_model, changes))


@few
def test_configurations_of_runs_of_strangers(colour_run, tmp_path, cases):
    run_dir = tmp_path / "run"
    folder = state.folder_of(run_dir, 8)
    shutil.copytree(state.folder_of(colour_run, state.steps_saved(colour_run)[-1]), folder)
    stored = yaml.safe_load((colour_run / "config.yaml").read_text())
    sections = st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("method", "seed", "data", "model", "objective"), NESTED)
    )
    changed = sections.map(lambda changes: yaml.safe_dump(stored | changes))

    def check(text: str | bytes) -> None:
        (run_dir / "config.yaml").write_bytes(
            text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        )
        for name in (str(run_dir), f"untrained:{run_dir}"):
            with suppress(UserError):
                pretrained.load(name)

    each(st.one_of(TEXTS, changed), max(10, cases // 2), check)


CONFIGS = st.one_of(
    NESTED,
    st.fixed_dictionaries(
        {
            "architecture": st.one_of(st.sampled_from(["vit_tiny_patch16_224", "resnet18", "", "../x", "no"]), VALUES),
            "pretrained_cfg": st.one_of(
                NESTED,
                st.fixed_dictionaries(
                    {
                        "input_size": st.one_of(
                            st.sampled_from([[3, 224, 224], [3, 32], [], [3, 0, 0], [1, 2, 3, 4]]), NESTED
                        ),
                        "mean": NESTED, "std": NESTED,
                    },
                    optional={"url": st.just("file:///etc/passwd"), "tag": NESTED, "num_classes": NESTED},
                ),
            ),
        },
        optional={"model_args": st.one_of(
            NESTED,
            st.dictionaries(st.sampled_from(["embed_dim", "depth", "patch_size", "num_heads", "img_size"]), VALUES),
        ), "num_features": NESTED},
    ),
)  # fmt: skip


@few
def test_exported_folders_of_strangers(tmp_path, cases):
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")

    def check(stored: object) -> None:
        (folder / "config.json").write_text(json.dumps(stored))
        with suppress(UserError):
            pretrained.load(str(folder))

    each(CONFIGS, max(10, cases // 2), check)


@pytest.fixture(scope="module")
def bases(labelled, tmp_path_factory) -> dict[str, Path]:
    """What the campaigns damage: a run of each method with a result, its export, and labelled images."""
    folder = tmp_path_factory.mktemp("bases")
    found = {"labelled": labelled, "export": folder / "export"}
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "k=[3]"]
    for method in ("mae", "dino"):
        found[method] = folder / method
        assert main(["pretrain", str(labelled / "train"), *words(method, *hostile.SHORT, f"out={found[method]}")]) == 0
        assert main(["knn", f"run={found[method]}", *sets]) == 0
    assert main(["export", f"run={found['mae']}", "to=timm", f"out={found['export']}"]) == 0
    return found


def attacked(names: list[str], cases: range, bases: dict[str, Path], tmp_path: Path) -> dict[str, int]:
    """{outcome: cases} of hostile cases, in two processes at once. Nothing may go wrong."""
    halves = []
    for half in (0, 1):
        report, log = tmp_path / f"report{half}.json", tmp_path / f"log{half}"
        arguments = names, list(cases[half::2]), tmp_path / f"place{half}", bases, report
        halves.append((processes.begin(hostile.attack, *arguments, output=log), report, log))
    counts, wrong, peaks = Counter[str](), [], []
    for process, report, log in halves:
        processes.finish(process, log, seconds=hostile.SECONDS * len(cases))
        found = json.loads(report.read_text())
        counts += Counter(found["counts"])
        wrong += found["wrong"]
        peaks.append(found["peak"])
    print(f"{counts.total()} cases of {', '.join(names)}: {dict(counts)}, {max(peaks) / 2**30:.1f} GiB at most")
    assert not wrong, "\n\n".join("\n".join(map(str, case)) for case in wrong[:20])
    return counts


@pytest.mark.slow
def test_a_thousand_runs_and_exports_of_strangers_whose_checksums_are_right_do_no_harm(bases, tmp_path):
    counts = attacked(["stranger"], range(1000, 2000), bases, tmp_path)
    assert counts["refused"] > 250
    assert counts["taken"] > 0  # much of what is damaged is not read by the command


@pytest.mark.slow
def test_three_hundred_hostile_archives_images_arrays_tables_and_servers_do_no_harm(bases, tmp_path):
    counts = attacked(["inputs"], range(3000, 3300), bases, tmp_path)
    assert counts["refused"] > 75
    assert counts["taken"] > 0
