"""Folders and files that somebody else has made, drawn from a seed, and a process of its own for each to be read in.

`attack` makes the cases of a campaign one after another. No case may run code, reach the network, write outside of its
folder, print a secret, end in a traceback, or need more time or memory than its limits.
"""

import http.server
import importlib
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from sslvit.__main__ import main
from sslvit.arguments import flatten
from sslvit.checkpoints import state

from .conftest import words
from .forked_python import Interpreter

SECONDS = 60  # of one case, on a machine that does other things as well
MEMORY = 4 << 30  # bytes that one case may map, beside what an idle process of ours has
SHORT = ["save.every_steps=4", "workers=0", "warmup_epochs=0", "precision=float32"]  # of the runs that are damaged
SECRET, MARKER = "the-secret-of-this-user", "code-has-run"


class Trap:
    """What unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class Place:
    """Where a campaign happens: `outside` and `here` must stay as they are, `case` is the attacker's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.case, self.outside, self.here = (folder, *(folder / n for n in ("case", "outside", "here")))
        self.marker, self.peak = folder / MARKER, 0  # peak: bytes in memory of the largest process
        for path in (self.outside / "folder", self.here / "runs" / "theirs", self.case):
            path.mkdir(parents=True)
        (self.outside / "secret.txt").write_text(SECRET)
        (self.outside / "folder" / "notes.md").write_text("mine")
        (self.outside / "script.sh").write_text("#!/bin/sh\n")
        save_file({"x": torch.zeros(2)}, self.outside / "model.safetensors")
        code = f"from pathlib import Path\nPath({str(self.marker)!r}).touch()\n"
        for path in ("payload.py", "runs/theirs/payload.py", "sitecustomize.py", "runs/theirs/__init__.py"):
            (self.here / path).write_text(code)
        self.before = self.snapshot()

    def snapshot(self) -> dict[str, tuple]:
        """What lies outside of the case."""
        found = {}
        for path in sorted([self.folder, *self.outside.rglob("*"), *self.here.rglob("*")]):
            about = path.lstat()
            known = path.read_bytes() if path.is_file() else sorted(os.listdir(path)) if path != self.folder else None
            found[str(path)] = (about.st_mode, about.st_mtime_ns if path.is_file() else 0, known)
        return found


def contained(work: Callable[[], int], place: Place) -> tuple[str, str]:
    """(what is wrong or "", what was printed) after calling `work` in a process of its own, with its limits."""
    log = place.folder / "log"
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
            os.dup2(1, 2)
            os.chdir(place.here)
            sys.path.insert(0, str(place.here))
            os.environ.update(HOME=str(place.outside), SSLVIT_SECRET=SECRET, HF_HOME=str(place.outside / "hf"))
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.addaudithook(_network)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + SECONDS
    while not (ended := os.wait4(pid, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.005)
    if not ended[0]:
        os.killpg(pid, signal.SIGKILL)
        ended = os.wait4(pid, 0)
    code, text = os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace")
    wrong = []
    if time.monotonic() >= until:
        wrong.append("hangs")
    elif code not in (0, 2, 75) or "Traceback" in text:
        wrong.append(f"ends with {code}")
    if place.marker.exists():
        wrong.append("runs code")
        place.marker.unlink()
    place.peak = max(place.peak, ended[2].ru_maxrss << 10)
    if "enough memory" in text or "memory of the machine" in text:
        wrong.append("needs more memory")
    if "reaches the network" in text:
        wrong.append("reaches the network")
    if SECRET in text:
        wrong.append("prints a secret")
    after = place.snapshot()
    if after != place.before:
        changed = [name for name in {*after, *place.before} if after.get(name) != place.before.get(name)]
        wrong.append(f"writes outside: {', '.join(sorted(changed))[:300]}")
        place.before = after
    return ", ".join(wrong), text


def _network(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo" and not str(arguments[0]).startswith("127.0.0.1"):
        print("reaches the network", flush=True)


def attack(names: list[str], seeds: list[int], folder: Path, bases: dict[str, Path], report: Path) -> int:
    """Run cases, and write {"counts": {outcome: n}, "peak": bytes, "wrong": [[seed, what, words, damage, output]]}."""
    own = (
        "checkpoints.exported",
        "evaluation.compare",
        "evaluation.finetune",
        "export.timm_folder",
        "tools.data_report",
    )
    for name in (
        *own,
        "evaluation.knn",
        "pretrain",
        "data.sources.download",
        "data.sources.hdf5",
        "data.sources.parquet",
    ):
        importlib.import_module(f"sslvit.{name}")  # once for all cases
    interpreter, place = Interpreter(), Place(folder)
    interpreter.executable  # noqa: B018 - starts it, once for all cases
    sys.modules["sslvit.checkpoints.exported"].sys = interpreter
    download = sys.modules["sslvit.data.sources.download"]
    download.TIMEOUT = download.SLOW_SECONDS = 3.0
    counts: dict[str, int] = {}
    wrong = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.secret, place.address = place.outside / "secret.txt", f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for seed in seeds:
        shutil.rmtree(place.case)
        place.case.mkdir()
        generator = random.Random(seed)
        make = {"stranger": stranger, "inputs": inputs}[generator.choice(names)]
        argv, damage = make(generator, place, bases)
        what, text = contained(lambda argv=argv: main([str(word) for word in argv]), place)
        outcome = what or ("taken" if not text.startswith("sslvit ") and "\nsslvit " not in text else "refused")
        counts[outcome.split(":")[0]] = counts.get(outcome.split(":")[0], 0) + 1
        if what:
            wrong.append([seed, what, " ".join(map(str, argv)), damage, text[-3000:]])
        report.write_text(json.dumps({"counts": counts, "peak": place.peak, "wrong": wrong}))
    interpreter.close()
    return 0


# Values of every type, size and sign.
NUMBERS = [
    0, 1, -1, 2, 3, 255, 65536, 2**31, -(2**31), 2**53, 2**63, -(2**63), 10**19, 10**400, 0.5, -0.0, 1e-300, 1e300,
    math.inf, -math.inf, math.nan, 10**6, 10**9, 10**12,
]  # fmt: skip
TEXTS = [
    "", "x", "auto", "null", "mae", "dino", "payload", "runs.theirs.payload", "runs/theirs/payload.py",
    "venv.__main__", "antigravity", "..", "../../outside/folder", "/etc/passwd", "/dev/zero", "/dev/stdin",
    "~/secret.txt", "a\0b", "é" * 300, "${oc.env:SSLVIT_SECRET}", "${oc.env:HOME}", "${seed}", "${out}", "${", "???",
    "\x1b[31mred\x1b[0m", "a\nb\tc", "1e400", "hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp",
    "https://example.com/x.pth", "http://127.0.0.1:9/x.zip", "vit_giant_patch14_dinov2", "vit_tiny_patch16_224",
    "resnet18", "swin_tiny_patch4_window7_224", "cls", "mean", "token", "fractals", "cifar10",
    "!!python/object/apply:os.system ['touch x']", "\u202e", "\ud800",
]  # fmt: skip


def value(r: random.Random, depth: int = 0) -> object:
    """Any value that YAML and JSON can hold."""
    kind = r.random()
    if kind < 0.4:
        return r.choice(NUMBERS)
    if kind < 0.75 or depth > 2:
        return r.choice(TEXTS)
    if kind < 0.85:
        return r.choice([None, True, False, [], {}])
    if kind < 0.95:
        return [value(r, depth + 1) for _ in range(r.randrange(5))]
    return {
        r.choice(["file", "url", "depth", "x", "", "a.b", "embed_dim"]): value(r, depth + 1)
        for _ in range(r.randrange(3))
    }


def put(r: random.Random, values: dict, key: list[str], new: object) -> None:
    for part in key[:-1]:
        values = values.setdefault(part, {}) if isinstance(values, dict) else {}
        if not isinstance(values, dict):
            return
    if r.random() < 0.1:
        values.pop(key[-1], None)
    else:
        values[key[-1]] = new


MODEL_ARGS = [
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "depth", "embed_dim",
    "img_size", "patch_size", "num_heads", "mlp_ratio", "reg_tokens", "act_layer", "norm_layer", "mlp_layer",
    "block_fn", "embed_layer", "weight_init", "fix_init", "num_classes", "global_pool", "class_token", "scriptable",
    "exportable", "features_only", "kernel_size", "window_size", "in_chans", "drop_path_rate", "dynamic_img_size",
    "qkv_bias", "init_values", "no_embed_class",
]  # fmt: skip


DANGEROUS = [
    ["method"],
    ["model", "name"],
    ["model", "args", "checkpoint_path"],
    ["model", "args", "depth"],
    ["data", "image_size"],
]


def is_own(path: Path) -> bool:
    """Whether it is a plain file or folder and no damage before has put a link in its way."""
    return path.resolve() == path.absolute() and (path.is_file() or path.is_dir())


def change_config(r: random.Random, path: Path, place: Place) -> str:
    """Settings of a run."""
    if not is_own(path):
        return "nothing"
    values = yaml.safe_load(path.read_text())
    keys = [key.split(".") for key in flatten(values)] + [["model", "args", name] for name in MODEL_ARGS]
    keys += [["method"], ["seed"], ["model", "name"], ["model", "args"], ["objective"], ["data"], ["model"], ["nobody"]]
    changes = []
    for _ in range(r.choice([1, 1, 2, 4])):
        key, new = r.choice(keys if r.random() < 0.6 else DANGEROUS), value(r)
        if key[-1] in ("checkpoint_path", "file", "cache_dir"):
            new = str(r.choice([place.case / "pickle.pth", place.outside / "model.safetensors", place.outside]))
        if key == ["method"]:
            new = r.choice(["payload", "payload", "runs.theirs.payload", "venv.__main__", "objectives.mae", "dino"])
        put(r, values, key, new)
        changes.append(f"{'.'.join(key)}={new!r}"[:100])
    text = yaml.safe_dump(values) if r.random() < 0.9 else json.dumps(values)
    if r.random() < 0.1:
        text = (
            r.choice(["x: !!python/object/apply:os.system ['touch payload']\n", "- 1\n", "&a [*a]\n", "\0", ""]) + text
        )
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if r.random() < 0.1 and data:
        data[r.randrange(len(data))] = r.randrange(256)
        changes.append("a byte")
    path.write_bytes(data)
    return f"{path.name}: {'; '.join(changes)}"


def change_json(r: random.Random, path: Path) -> str:
    """state.json of a checkpoint, config.json of an export, or a result."""
    if not is_own(path):
        return "nothing"
    values = json.loads(path.read_text())
    if r.random() < 0.08:
        path.write_text(
            r.choice(["", "[]", "3", "null", "{", "[" * 100_000, '{"a":' * 5000, "NaN", '"x"', "\xff"]), "latin-1"
        )
        return f"{path.name} is something else"
    leaves, changes = [], []

    def collect(node: object, key: list[str]) -> None:
        if isinstance(node, dict):
            for name in node:
                leaves.append([*key, name])
                collect(node[name], [*key, name])

    collect(values, [])
    leaves += [["model_args", name] for name in MODEL_ARGS] if path.name == "config.json" else []
    leaves += [
        ["pretrained_cfg", n] for n in ("file", "url", "hf_hub_id", "custom_load", "source", "state_dict", "tag")
    ]
    for _ in range(r.choice([1, 1, 2, 4])):
        key, new = r.choice(leaves), value(r)
        put(r, values, key, new)
        changes.append(f"{'.'.join(key)}={new!r}"[:100])
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {'; '.join(changes)}"


def change_tensors(r: random.Random, path: Path, place: Place) -> str:
    """Weights or moments."""
    if not is_own(path):
        return "nothing"
    what = r.choice(
        ["shape", "dtype", "name", "missing", "more", "nan", "empty", "pickle", "bytes", "header", "scalar", "big"]
    )
    if what == "pickle":
        torch.save({"model": Trap(place.marker)}, path)
    elif what == "bytes":
        data = bytearray(path.read_bytes())
        for _ in range(r.choice([1, 20])):
            data[r.randrange(min(len(data), r.choice([8, 5000, 10**9])))] = r.randrange(256)
        path.write_bytes(data)
    elif what == "header":
        header = json.dumps(
            {"x": {"dtype": r.choice(["F32", "X"]), "shape": value(r), "data_offsets": value(r)}}
        ).encode()
        path.write_bytes(r.choice([len(header), 2**63, 0]).to_bytes(8, "little") + header + bytes(64))
    else:
        tensors = load_file(path)
        for name in r.sample(sorted(tensors), min(len(tensors), r.choice([1, 3, 1000]))):
            old = tensors[name]
            if what == "shape":
                tensors[name] = r.choice(
                    [old[None], old.flatten(), old.flatten()[:1], old.new_zeros(0), old.new_zeros(7, 5)]
                )
            elif what == "dtype":
                kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
                tensors[name] = old.to(r.choice(kinds))
            elif what == "name":
                tensors[r.choice(["x", "", "a/b/c", name + "/exp_avg", name.upper(), "é", "/"])] = tensors.pop(name)
            elif what == "missing":
                del tensors[name]
            elif what == "more":
                tensors[name + "x"] = old.clone()
            elif what == "nan":
                tensors[name] = torch.full_like(old.float(), r.choice([math.nan, math.inf, 1e38, -1e38]))
            elif what == "scalar":
                tensors[name] = torch.tensor(r.choice([0.0, -1.0, 1e30, math.nan]))
            elif what == "big":
                tensors[name] = torch.zeros(r.choice([10**6, 10**7]))
                break
        save_file({} if what == "empty" else {key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return f"{path.name}: {what}"


RUN_FILES = [
    "config.yaml", "config.yaml.tmp", "starts.jsonl", "metrics.jsonl", ".lock", "bad_images.txt", "nonfinite.jsonl",
    "eval", "tensorboard", "checkpoints", "eval/knn.json", "eval/features", "checkpoints/.writing_000000009",
    "eval/untrained", "checkpoints/step_000000008", "checkpoints/step_000000008/state.json",
    "checkpoints/step_000000008/sha256.txt", "eval/confusion.png", "eval/retrieval.html", "model.safetensors",
    "config.json", "README.md", "eval/knn.png",
]  # fmt: skip


def change_names(r: random.Random, folder: Path, place: Place) -> str:
    """A link, a pipe, a folder or another file in the place of one."""
    path = folder / r.choice([name for name in RUN_FILES if is_own((folder / name).parent)])
    what = r.choice(["link", "link", "link", "pipe", "folder", "text", "bytes", "gone", "zero"])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    targets = [
        place.outside / n for n in ("secret.txt", "folder", "folder/notes.md", "new", "model.safetensors", "folder/new")
    ]
    if what == "link":
        target = r.choice(targets)
        path.symlink_to(target if r.random() < 0.7 else os.path.relpath(target, path.parent))
        return f"{path.relative_to(folder)} is a link to {target.relative_to(place.folder)}"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text(r.choice(["", "x", '{"step": "x"}\n', '{"step": 1e999}\n', "a\tb\n" * 1000, SECRET[:3]]))
    elif what == "bytes":
        path.write_bytes(r.randbytes(1000))
    elif what == "zero":
        path.symlink_to(r.choice(["/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/environ", path.name]))
    return f"{path.relative_to(folder)}: {what}"


def change_steps(r: random.Random, run: Path, place: Place) -> str:
    """Folders of checkpoints under other names, and more of them."""
    folder = run / "checkpoints"
    found = sorted(folder.glob("step_*"))
    new = "step_" + r.choice(
        ["5", "²", "000000020", "000000000", "-00000001", "٣", "9" * 30, "000000008 ", "1e9", "", "0_8"]
    )
    if not found or (folder / new).exists() or not is_own(folder) or not is_own(found[-1]):
        return "nothing"
    shutil.copytree(found[-1], folder / new, symlinks=True)
    if r.random() < 0.5:
        shutil.rmtree(found[-1])
    return f"{new} is a copy of {found[-1].name}"


def more_files(r: random.Random, folder: Path, place: Place) -> str:
    name = r.choice(
        ["pytorch_model.bin", "model.pth", "optimizer.pt", "eval/features/x.npy", "payload.py", "conftest.py"]
    )
    path = folder / name
    if not is_own(path.parent) or path.exists():
        return "nothing"
    if path.suffix == ".py":
        path.write_text(f"from pathlib import Path\nPath({str(place.marker)!r}).touch()\n")
    else:
        torch.save({"model": Trap(place.marker)}, path) if r.random() < 0.5 else path.write_bytes(
            pickle.dumps(Trap(place.marker))
        )
    return f"{name} is there too"


def checksums(run: Path) -> None:
    """Those of all checkpoints, as their contents are now."""
    for folder in (run / "checkpoints").glob("step_*"):
        names = (state.SUMS, state.MODEL, state.OPTIMIZER, state.STATE)
        sums, *names = [n if is_own(folder / n) and (folder / n).is_file() else "" for n in names]
        if sums and (names := [n for n in names if n]):
            (folder / state.SUMS).write_text("".join(f"{state._checksum(folder / n)}  {n}\n" for n in names))


def stranger(r: random.Random, place: Place, bases: dict[str, Path]) -> tuple[list, str]:
    """(the words of a command, what was done to the run or the export that it names)."""
    torch.save({"model": Trap(place.marker)}, place.case / "pickle.pth")
    method = r.choice(["mae", "dino"])
    exported = r.random() < 0.2
    folder = place.case / ("encoder" if exported else "run")
    shutil.copytree(bases["export" if exported else method], folder)
    done = []
    for _ in range(r.choice([1, 1, 2])):
        if exported:
            kinds = [
                lambda: change_json(r, folder / "config.json"),
                lambda: change_tensors(r, folder / "model.safetensors", place),
                lambda: change_names(r, folder, place),
                lambda: more_files(r, folder, place),
                lambda: shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin"),
                lambda: (
                    torch.save({"x": Trap(place.marker)}, folder / "pytorch_model.bin")
                    or (folder / "model.safetensors").unlink(missing_ok=True)
                ),
            ]
        else:
            last = sorted((folder / "checkpoints").glob("step_0*"))
            newest = last[-1] if last else folder
            kinds = [
                lambda: change_config(r, folder / "config.yaml", place),
                lambda: change_config(r, folder / "config.yaml", place),
                lambda newest=newest: change_json(r, newest / state.STATE),
                lambda newest=newest: change_tensors(r, newest / r.choice([state.MODEL, state.OPTIMIZER]), place),
                lambda: change_names(r, folder, place),
                lambda: change_steps(r, folder, place),
                lambda: more_files(r, folder, place),
                lambda: change_json(r, folder / "eval" / "knn.json"),
            ]
        try:
            done.append(str(r.choice(kinds)()))
        except Exception as error:
            done.append(f"(the second damage does not go on the first: {type(error).__name__})")
    checksums(folder)
    labelled, out = bases["labelled"], place.case / "out"
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "workers=0"]
    resume = ["pretrain", labelled / "train", *words(method, *SHORT, "epochs=3"), f"out={folder}"]
    finetune = ["finetune", f"run={folder}", *sets, "epochs=1", "batch_size=8", "warmup_epochs=0"]
    commands = [
        ["knn", f"run={folder}", *sets, "k=[3]"],
        ["export", f"run={folder}", "to=timm", f"out={out}"],
        finetune,
        ["compare", folder, bases[method]],
    ]
    if not exported:
        commands += [
            ["knn", f"run=untrained:{folder}", *sets, "k=[3]"],
            ["knn", f"run={folder / 'checkpoints' / 'step_000000008'}", *sets, "k=[3]"],
            resume,
            resume,
        ]
        if "config.yaml:" in "; ".join(done) and r.random() < 0.4:  # this command reads the most of it
            commands = commands[4:5]
    return r.choice(commands), "; ".join(done)


def pixels(r: random.Random, h: int = 40, w: int = 36, c: int = 3) -> np.ndarray:
    return np.random.default_rng(r.randrange(2**32)).integers(0, 256, (h, w, c), dtype=np.uint8)


def encoded(r: random.Random, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(r)).save(file, kind)
    return file.getvalue()


def mutated(r: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut, repeated or gone; headers most of all."""
    changed = bytearray(data)
    for _ in range(r.choice([0, 1, 1, 3, 10])):
        at = r.randrange(min(len(changed), r.choice([32, 200, 10**9])) or 1)
        what = r.choice(["byte", "ones", "zeros", "cut", "repeat", "drop", "tail"])
        if what == "byte":
            changed[at : at + 1] = bytes([r.randrange(256)])
        elif what in ("ones", "zeros"):
            changed[at : at + r.choice([4, 8])] = (b"\xff" if what == "ones" else b"\0") * r.choice([4, 8])
        elif what == "cut":
            del changed[at:]
        elif what == "repeat":
            changed[at:at] = changed[at : at + 100]
        elif what == "drop":
            del changed[at : at + r.randrange(1, 20)]
        elif len(changed) > 100:  # the directory of an archive
            changed[-r.randrange(1, 100)] = r.randrange(256)
    return bytes(changed)


MEMBERS = [
    "a/0.png", "../../outside/new.png", "/etc/passwd", "x" * 300 + ".png", "a\nb.png", "\x1b[31m.png", "é.png",
    "a//b.png", "0.cls", "0.json", ".png", "a/", "con.png", "0.PNG", "0.npy", "0.tif", "0.svg", "\u202egnp.png",
    "0.png/1.png",
]  # fmt: skip


def hostile_zip(r: random.Random, path: Path, place: Place) -> str:
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(path, "w", r.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])) as file,
    ):
        warnings.simplefilter("ignore")  # the same name twice
        for _ in range(r.choice([1, 4, 40])):
            file.writestr(r.choice(MEMBERS), encoded(r) if r.random() < 0.7 else hostile_image(r)[0])
        if r.random() < 0.3:  # two thousand times smaller than what it becomes
            file.writestr(r.choice(["0.png", "0.cls", "0.npy", "0.tif"]), bytes(r.choice([10**6, 3 * 10**8])), 8)
    data = path.read_bytes()
    if r.random() < 0.5:  # sizes that are not so
        at = data.rfind(b"PK\1\2")
        field = r.choice([20, 24, 42, 28, 10, 8, 16])
        value = r.choice([0xFFFFFFFF, 0xFFFFFFFE, 2**31, 0, 99]).to_bytes(4, "little")
        data = data[: at + field] + value + data[at + field + 4 :]
    path.write_bytes(mutated(r, data) if r.random() < 0.5 else data)
    return "zip"


def hostile_tar(r: random.Random, path: Path, place: Place) -> str:
    with tarfile.open(path, "w", format=r.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as file:
        for _ in range(r.choice([1, 4, 40])):
            about, data = tarfile.TarInfo(r.choice(MEMBERS)), encoded(r)
            about.size = len(data)
            if r.random() < 0.3:
                about.type = r.choice(
                    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
                )
                about.linkname = r.choice(
                    [str(place.outside / "secret.txt"), "../../outside/secret.txt", "0.png", "/dev/zero"]
                )
            elif r.random() < 0.2:
                about.pax_headers = {"size": str(r.choice([10**18, -1])), "path": "x" * 10**5, "GNU.sparse.major": "1"}
            file.addfile(about, io.BytesIO(data))
    data = bytearray(path.read_bytes())
    if r.random() < 0.4:  # the size in the header of the first member
        data[124:136] = r.choice([b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"abc\0".ljust(12)])
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(mutated(r, data) if r.random() < 0.5 else data)
    return "tar"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def hostile_image(r: random.Random) -> tuple[bytes, str]:
    """(contents, ending)."""
    kind = r.choice(["png", "jpeg", "tiff", "gif", "bmp", "webp", "npy", "mutated", "mutated", "mutated", "ppm"])
    side = r.choice([20_000, 60_000, 2**31 - 1])
    if kind == "png":
        depth = r.choice([8, 16])
        header = struct.pack(">IIBBBBB", side, r.choice([side, 1, 20_000]), depth, r.choice([0, 2, 6]), 0, 0, 0)
        body = chunk(b"IDAT", zlib.compress(bytes(10**7)))
        text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))) if r.random() < 0.3 else b""
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + body + chunk(b"IEND", b""), ".png"
    if kind == "jpeg":
        data = bytearray(encoded(r, "JPEG"))
        at = data.find(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", *r.choice([(65500, 65500), (0, 65500), (65500, 16), (20000, 20000)]))
        return bytes(data), ".jpg"
    if kind == "tiff":
        file = io.BytesIO()
        Image.fromarray(pixels(r)[..., 0].astype(np.uint16)).save(file, "TIFF")
        data = bytearray(file.getvalue())
        for tag in (256, 257, 278):
            at = data.find(struct.pack("<HH", tag, 4)) + 1 or data.find(struct.pack("<HH", tag, 3)) + 1
            if at and r.random() < 0.8:
                data[at + 1 : at + 11] = struct.pack("<HII", 4, 1, r.choice([60_000, 2**31, 0]))
        return bytes(data), ".tif"
    if kind == "gif":
        return b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes([0xF0, 0, 0]) + bytes(6) + b"," + bytes(
            9
        ) + b"\2\0;", ".gif"
    if kind == "bmp":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, side, -side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(
            50
        ), ".bmp"
    if kind == "ppm":
        return b"P6 %d %d 65535\n" % (side, side) + bytes(100), ".ppm"
    if kind == "npy":
        return hostile_npy(r), ".npy"
    name = r.choice(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
    return mutated(r, encoded(r, name if kind == "mutated" else "WEBP")), f".{name.lower()}"


def hostile_npy(r: random.Random) -> bytes:
    shape = r.choice(
        ["(10, 40, 36, 3)", "(1, 99999, 99999)", "(99999999999, 2, 2)", "(-1, 2, 2)", "(2,)", "()", "(True,)", "(1e9,)"]
    )
    kind = r.choice(["|u1", "<f8", "|O", "<U9", "<c16", "|V8", "[('a', '<f8')]", "<m8", "x"])
    kind = kind if kind[0] == "[" else repr(kind)
    text = f"{{'descr': {kind}, 'fortran_order': {r.random() < 0.2}, 'shape': {shape}, }}"
    text = r.choice([text, text, text, "[" * 2000, "{'descr': 1}", "__import__('os').system('x')"])
    return (
        b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + bytes(r.choice([0, 100, 50_000]))
    )


def hostile_array(r: random.Random, path: Path, place: Place) -> str:
    objects = np.empty(3, dtype=object)
    objects[:] = [Trap(place.marker)] * 3
    if path.suffix == ".npy":
        np.save(path, objects, allow_pickle=True) if r.random() < 0.2 else path.write_bytes(hostile_npy(r))
        return "npy"
    zeros = np.broadcast_to(np.zeros((), np.uint8), (r.choice([4, 4, 200_000]), 40, 36, 3))
    choices = [
        {"images": zeros},
        {"images": objects},
        {"images": pixels(r)[None], "labels": objects},
        {"x": np.zeros(3)},
        {},
    ]
    np.savez_compressed(path, **r.choice(choices))
    if r.random() < 0.5:
        path.write_bytes(mutated(r, path.read_bytes()))
    return "npz"


def hostile_hdf5(r: random.Random, path: Path, place: Place) -> str:
    import h5py

    what = r.choice(
        ["virtual", "external", "link", "loop", "huge", "packed", "chunks", "kinds", "bytes", "bytes", "itself"]
    )
    with h5py.File(path, "w") as file:
        if what in ("virtual", "itself"):
            layout = h5py.VirtualLayout((10, 40, 36), np.uint8)
            layout[:] = h5py.VirtualSource(
                "." if what == "itself" else str(place.outside / "secret.txt"), "images", (10, 40, 36)
            )
            file.create_virtual_dataset("images", layout)
        elif what == "external":
            name = str(r.choice(["/etc/passwd", place.outside / "secret.txt", "/dev/zero"]))
            file.create_dataset("images", (3, 4, 4), np.uint8, external=[(name, 0, 48)])
        elif what == "link":
            file["images"] = r.choice([h5py.ExternalLink(str(place.outside / "x.h5"), "y"), h5py.SoftLink("/nowhere")])
        elif what == "loop":
            file["a"] = h5py.SoftLink("/b")
            file["b"] = h5py.SoftLink("/a")
            file.create_group("c")["d"] = file["/"]
        elif what == "huge":
            file.create_dataset(
                "images", (r.choice([1, 10**9]), 40_000, 40_000), np.float64, chunks=(1, 10, 10), compression="gzip"
            )
        elif what == "packed":
            data = file.create_dataset(
                "images", (2, 20_000, 20_000), np.uint8, chunks=(1, 20_000, 20_000), compression="gzip"
            )
            data[0] = 0
        elif what == "chunks":
            file.create_dataset("images", (4, 8, 8), np.uint8, chunks=(4, 8, 8), maxshape=(None, None, None))
            file.create_dataset("labels", data=np.arange(4) - 2**62)
        elif what == "kinds":
            data = r.choice(
                [np.zeros((3, 4)), np.array([b"x", b"yy"]), np.zeros((2, 4, 4), complex), np.zeros((2, 4, 4), "i8") - 5]
            )
            file.create_dataset("images", data=data)
        else:
            file.create_dataset("images", data=np.stack([pixels(r) for _ in range(8)]))
            file.create_dataset("labels", data=np.arange(8) % 2)
    if what == "bytes":
        path.write_bytes(mutated(r, path.read_bytes()))
    return f"hdf5: {what}"


def hostile_table(r: random.Random, path: Path, place: Place) -> str:
    (place.case / "0.png").write_bytes(encoded(r))
    os.mkfifo(place.case / "pipe.png")
    (place.case / "link.png").symlink_to(place.outside / "secret.txt")
    names = [
        "0.png", "pipe.png", "link.png", "/dev/zero", "/dev/stdin", "/proc/self/environ", "../outside/secret.txt",
        ".", "", "x" * 5000, "a\0b", "http://127.0.0.1:9/x.png", "\x1b]0;x\7.png", '"0.png', "0.png\t0.png", "*.png",
        "~", "[a", "é",
    ]  # fmt: skip
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        cells = [
            r.choice([None, b"", encoded(r), b"x" * 100, hostile_image(r)[0][: 10**6]]) for _ in range(r.choice([1, 9]))
        ]
        table = {"image": pyarrow.array(cells, pyarrow.binary()), "label": [r.choice([-1, 2**62, 0]) for _ in cells]}
        pyarrow.parquet.write_table(pyarrow.table(table if r.random() < 0.8 else {"x": [1]}), path)
        path.write_bytes(mutated(r, path.read_bytes()) if r.random() < 0.7 else path.read_bytes())
        return "parquet"
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix, "\n")
    labels = [""] if path.suffix == ".txt" else [separator + label for label in ("1", "x", "1e999", "", "nan")]
    rows = ["path" + separator + "label"] if r.random() < 0.5 and path.suffix != ".txt" else []
    rows += [r.choice(names) + r.choice(labels) for _ in range(r.choice([1, 5, 5000]))]
    data = "\n".join(rows).encode("utf-8", "surrogatepass")
    path.write_bytes(
        r.choice([data, data, mutated(r, data), b"\xff\xfe" + data, b"a," * 10**6, data.replace(b"\n", b"\r")])
    )
    return path.suffix


class Server(http.server.BaseHTTPRequestHandler):
    """Answers in a way that the name of the file chooses."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        seed, _, what = self.path.strip("/").split(".")[0].partition("-")
        seed = seed if seed.isdecimal() else "0"
        data = encoded(random.Random(int(seed)))
        if what == "raw":
            self._send(mutated(random.Random(int(seed)), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123456789"))
        elif what == "slowheader":
            self._slowly(b"HTTP/1.0 200 OK\r\nX: " + b"y" * 10**6)
        elif what == "headers":
            self._send(b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 10**5 + b"\r\n" + data)
        else:
            with suppress(OSError):
                self._answer(seed, what, data)

    def _answer(self, seed: str, what: str, data: bytes) -> None:
        self.send_response({"moved": 302, "gone": 404, "odd": 999, "partial": 206}.get(what, 200))
        if what == "moved":
            targets = [
                f"file://{self.server.secret}",
                self.path,
                "http://[::1/x.zip",
                "ftp://127.0.0.1:9/x",
                "/%00.zip",
                "//",
            ]
            self.send_header("Location", random.Random(int(seed)).choice(targets))
        lengths = {"longer": len(data) + 9, "huge": 10**18, "negative": -5, "text": "x", "shorter": 10}
        if what in lengths:
            self.send_header("Content-Length", str(lengths[what]))
        if what == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if what == "slow":
            self._slowly(data * 100)
        if what == "endless":
            while self._send(bytes(2**20)):
                pass
        self._send(data)

    def _send(self, data: bytes) -> bool:
        try:
            return bool(self.wfile.write(data))
        except OSError:
            return False

    def _slowly(self, data: bytes) -> None:
        for i in range(len(data)):
            if not self._send(data[i : i + 1]):
                break
            time.sleep(0.5)

    def log_message(self, *arguments: object) -> None:
        pass


ANSWERS = [
    "raw", "slowheader", "headers", "moved", "moved", "gone", "odd", "partial", "longer", "huge", "negative", "text",
    "shorter", "packed", "slow", "endless", "good",
]  # fmt: skip


def hostile_url(r: random.Random, address: str) -> str:
    odd = [
        "http://[::1/a.zip",
        f"{address}/%00.zip",
        f"{address}/{'x' * 300}.zip",
        "http://127.0.0.1:99999/a.zip",
        "http:///a.zip",
    ]
    if r.random() < 0.2:
        return r.choice(odd)
    ending = r.choice([".zip", ".tar", ".npy", ".h5", ".parquet", ".npz"])
    return f"{address}/{r.randrange(10**6)}-{r.choice(ANSWERS)}{ending}"


def inputs(r: random.Random, place: Place, bases: dict[str, Path]) -> tuple[list, str]:
    """(the words of a command, what kind of images it is given)."""
    makers = {
        ".zip": hostile_zip, ".tar": hostile_tar, ".npy": hostile_array, ".npz": hostile_array, ".h5": hostile_hdf5,
        ".parquet": hostile_table, ".csv": hostile_table, ".txt": hostile_table, ".tsv": hostile_table,
    }  # fmt: skip
    kind = r.choice([*makers, ".zip", ".h5", ".npz", "folder", "folder", "folder", "url", "url"])
    if kind == "folder":
        given, damage = place.case / "images", "folder"
        given.mkdir()
        for i in range(r.choice([1, 3, 12])):
            data, ending = hostile_image(r) if r.random() < 0.7 else (encoded(r), ".png")
            name = f"{i}{r.choice(['', chr(10), chr(27) + '[31m', 'é', chr(0xDCFF), ' '])}{ending}"
            (given / name).write_bytes(data)
            damage += f" {ending}"
        if r.random() < 0.3:
            os.mkfifo(given / "pipe.png")
            (given / "loop").symlink_to(given)
            (given / "zero.png").symlink_to("/dev/zero")
    elif kind == "url":
        given = hostile_url(r, place.address)
        damage = given
    else:
        given = place.case / f"x{kind}"
        damage = makers[kind](r, given, place)
    small = [*words("mae", "steps=3", "warmup_epochs=0", "global_batch_size=1", "precision=float32"), "bad_ratio=1"]
    more = [f"workers={r.choice([0, 0, 1])}", f"download_dir={place.case / 'download'}"]
    labelled = bases["labelled"]
    commands = [
        ["pretrain", given, *small, *more, f"out={place.case / 'run'}"],
        ["data", given, *small, *more, f"out={place.case / 'run'}", "sample=20"],
        [
            "knn",
            "run=random:test_vit",
            f"data.train={given}",
            f"data.test={labelled / 'test'}",
            *more,
            "k=[1]",
            f"out={place.case / 'o'}",
        ],
    ]
    return r.choice(commands), damage
