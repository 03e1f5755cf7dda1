"""Folders and files that somebody else has made, drawn from a seed, and a process of its own for each to be read in.

`attack` makes the cases of a campaign one after another. Nothing of a case may run code, reach the network, write outside
of its folder, print a secret, end in a traceback, or need more time or memory than its limits.
"""

import importlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
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
        self.marker = folder / MARKER
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
            sys.addaudithook(lambda event, _: _network(event))
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + SECONDS
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.005)
    if not ended[0]:
        os.killpg(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)
    code, text = os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace")
    wrong = []
    if time.monotonic() >= until:
        wrong.append("hangs")
    elif code not in (0, 2, 75) or "Traceback" in text:
        wrong.append(f"ends with {code}")
    if place.marker.exists():
        wrong.append("runs code")
        place.marker.unlink()
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


def _network(event: str) -> None:
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print("reaches the network", flush=True)


def attack(names: list[str], seeds: list[int], folder: Path, bases: dict[str, Path], report: Path) -> int:
    """Run cases, and write {"counts": {outcome: n}, "wrong": [[seed, what, words, damage, output]]}."""
    for name in ("checkpoints.timm_format", "evaluation.compare", "evaluation.finetune", "export.timm_folder"):
        importlib.import_module(f"sslvit.{name}")  # once for all cases
    interpreter, place = Interpreter(), Place(folder)
    interpreter.executable  # noqa: B018 - starts it, once for all cases
    sys.modules["sslvit.checkpoints.timm_format"].sys = interpreter
    counts: dict[str, int] = {}
    wrong = []
    for seed in seeds:
        shutil.rmtree(place.case)
        place.case.mkdir()
        generator = random.Random(seed)
        make = {"stranger": stranger}[generator.choice(names)]
        argv, damage = make(generator, place, bases)
        what, text = contained(lambda argv=argv: main([str(word) for word in argv]), place)
        outcome = what or ("taken" if not text.startswith("sslvit ") and "\nsslvit " not in text else "refused")
        counts[outcome.split(":")[0]] = counts.get(outcome.split(":")[0], 0) + 1
        if what:
            wrong.append([seed, what, " ".join(map(str, argv)), damage, text[-3000:]])
        report.write_text(json.dumps({"counts": counts, "wrong": wrong}))
    interpreter.close()
    return 0


# Values of every type, size and sign.
NUMBERS = [
    0, 1, -1, 2, 3, 255, 65536, 2**31, -(2**31), 2**53, 2**63, -(2**63), 10**19, 10**400, 0.5, -0.0, 1e-300, 1e300,
    math.inf, -math.inf, math.nan, 10**6, 10**9, 10**12,
]  # fmt: skip
TEXTS = [
    "", "x", "auto", "null", "mae", "dino", "payload", "runs.theirs.payload", "runs/theirs/payload.py", "venv.__main__",
    "antigravity", "..", "../../outside/folder", "/etc/passwd", "/dev/zero", "/dev/stdin", "~/secret.txt", "a\0b", "é" * 300,
    "${oc.env:SSLVIT_SECRET}", "${oc.env:HOME}", "${seed}", "${out}", "${", "???", "\x1b[31mred\x1b[0m", "a\nb\tc", "1e400",
    "hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp", "https://example.com/x.pth", "http://127.0.0.1:9/x.zip",
    "vit_giant_patch14_dinov2", "vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "cls", "mean", "token",
    "fractals", "cifar10", "!!python/object/apply:os.system ['touch x']", "\u202e", "\ud800",
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
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "depth", "embed_dim", "img_size",
    "patch_size", "num_heads", "mlp_ratio", "reg_tokens", "act_layer", "norm_layer", "mlp_layer", "block_fn", "embed_layer",
    "weight_init", "fix_init", "num_classes", "global_pool", "class_token", "scriptable", "exportable", "features_only",
    "kernel_size", "window_size", "in_chans", "drop_path_rate", "dynamic_img_size", "qkv_bias", "init_values", "no_embed_class",
]  # fmt: skip


def change_config(r: random.Random, path: Path, place: Place) -> str:
    """Settings of a run."""
    values = yaml.safe_load(path.read_text())
    keys = [key.split(".") for key in flatten(values)] + [["model", "args", name] for name in MODEL_ARGS]
    keys += [["method"], ["seed"], ["model", "name"], ["model", "args"], ["objective"], ["data"], ["model"], ["nobody"]]
    changes = []
    for _ in range(r.choice([1, 1, 2, 4])):
        key, new = r.choice(keys), value(r)
        if key[-1] in ("checkpoint_path", "file", "cache_dir"):
            new = str(r.choice([place.case / "pickle.pth", place.outside / "model.safetensors", place.outside]))
        if key == ["method"] and r.random() < 0.5:
            new = r.choice(["payload", "runs.theirs.payload", "venv.__main__", "this", "antigravity", "objectives.mae"])
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
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return "nothing"
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
    "config.yaml", "config.yaml.tmp", "starts.jsonl", "metrics.jsonl", ".lock", "bad_images.txt", "nonfinite.jsonl", "eval",
    "tensorboard", "checkpoints", "eval/knn.json", "eval/features", "checkpoints/.writing_000000009", "eval/untrained",
    "checkpoints/step_000000008", "checkpoints/step_000000008/state.json", "checkpoints/step_000000008/sha256.txt",
    "eval/confusion.png", "eval/retrieval.html", "model.safetensors", "config.json", "README.md", "eval/knn.png",
]  # fmt: skip


def change_names(r: random.Random, folder: Path, place: Place) -> str:
    """A link, a pipe, a folder or another file in the place of one."""
    path = folder / r.choice([name for name in RUN_FILES if (folder / name).parent.is_dir()])
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
    if not found or (folder / new).exists():
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
    if not path.parent.is_dir() or path.exists():
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
        if folder.is_dir() and not folder.is_symlink() and (folder / state.SUMS).is_file():
            names = [n for n in (state.MODEL, state.OPTIMIZER, state.STATE) if (folder / n).is_file()]
            if not any((folder / n).is_symlink() for n in (*names, state.SUMS)):
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
        except (OSError, ValueError, RuntimeError, yaml.YAMLError, AttributeError, TypeError) as error:
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
    return r.choice(commands), "; ".join(done)
