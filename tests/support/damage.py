"""What may happen to a checkpoint's file, for test_damage.py: each mutation takes its bytes and a source of draws."""

import io
import pickle
import zipfile

import torch
from crash_runs import NUM_STEPS


class Trap:
    """Creates a file when it is unpickled by a loader that executes what a file says."""

    def __reduce__(self):
        return open, ("trapped", "w")


def deflated(content, name):
    """The checkpoint with compressed parts and a gigabyte of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part) if part != name else bytes(1 << 27))
    return out.getvalue()


def resaved(change, path):
    """The bytes of a whole file with changed content."""

    def mutate(content, draw):
        path.write_bytes(content)
        found = torch.load(path, weights_only=True)
        found = change(found, draw)
        torch.save(found, path)
        return path.read_bytes()

    return mutate


def with_(key, value):
    return lambda found, draw: {**found, key: value}


def in_model(change):
    """Change one tensor of the network, drawn."""

    def mutate(found, draw):
        name = draw.choice(sorted(found["model"]))
        found["model"][name] = change(found["model"][name])
        return found

    return mutate


def renamed(found, draw):
    name = draw.choice(sorted(found["model"]))
    found["model"][name + "x"] = found["model"].pop(name)
    return found


def absurd(tensor):
    return torch.zeros((), dtype=tensor.dtype).expand(1 << 40)


def other_dtype(tensor):
    return tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.float32)


def momentum(change):
    def mutate(found, draw):
        values = found["optimizer"]["state"][draw.randrange(len(found["optimizer"]["state"]))]
        values["momentum_buffer"] = change(values["momentum_buffer"])
        return found

    return mutate


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def flip(content, draw):
    at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def flip_in_pickle(content, draw):
    at, bit = content.index(b"PK") + draw.randrange(6000), 1 << draw.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def zeros(content, draw):
    at = draw.randrange(len(content))
    return content[:at] + bytes(len(content[at : at + 4096])) + content[at + 4096 :]


def not_whole(path):
    """By name: damage after which a file is no whole archive of uncompressed parts; `longer` and `twice` may leave it one."""
    return {
        "empty": lambda content, draw: b"",
        "text": lambda content, draw: b"not a checkpoint\n" * 99,
        "pickle": lambda content, draw: pickle.dumps(Trap()),
        "bomb": lambda content, draw: deflated(content, zipfile.ZipFile(path).namelist()[0]),
        "nul": lambda content, draw: bytes(len(content)),
        "longer": lambda content, draw: content + bytes(draw.randrange(1, 99999)),
        "twice": lambda content, draw: content + content[len(content) // 2 :],
    }


def in_file_mutations(path):
    """By name: what may happen to a file without its being a whole checkpoint of this run afterwards."""
    saved = {
        "step-nan": with_("step", float("nan")),
        "step-float": with_("step", 3.0),
        "step-true": with_("step", True),
        "step-negative": with_("step", -1),
        "step-beyond": with_("step", NUM_STEPS + 1),
        "step-huge": with_("step", 10**400),
        "step-text": with_("step", "3"),
        "step-tensor": with_("step", torch.zeros(1 << 20)),
        "format": with_("bln_train_format", 2),
        "format-tensor": with_("bln_train_format", torch.ones(2)),
        "no-model": lambda found, draw: {k: v for k, v in found.items() if k != "model"},
        "no-optimizer": lambda found, draw: {k: v for k, v in found.items() if k != "optimizer"},
        "no-rng": lambda found, draw: {k: v for k, v in found.items() if k != "torch_rng"},
        "model-list": with_("model", [1, 2]),
        "model-none": with_("model", None),
        "sums-nan": with_("epoch_sums", {"images": 2, "loss": float("nan")}),
        "sums-keys": with_("epoch_sums", {"images": 2, "lust": 1.0}),
        "sums-many": with_("epoch_sums", {"images": 10**9}),
        "micro-batch-zero": with_("micro_batch_size", 0),
        "micro-batch-text": with_("micro_batch_size", "all"),
        "micro-batch-beyond": with_("micro_batch_size", 10**9),
        "skipped-negative": with_("skipped", [-1, 0]),
        "skipped-number": with_("skipped", 3),
        "health-list": with_("health", [1]),
        "health-layers": with_("health", {"initial_std": {"no.such": torch.ones(2)}, "said": {}}),
        "health-said": lambda found, draw: {**found, "health": {**found["health"], "said": {"dead": 3}}},
        "rng-short": with_("torch_rng", torch.zeros(3, dtype=torch.uint8)),
        "rng-absurd": with_("torch_rng", torch.zeros((), dtype=torch.uint8).expand(1 << 40)),
        "rng-float": with_("torch_rng", torch.zeros(5056)),
        "renamed": renamed,
        "extra": lambda found, draw: {**found, "model": {**found["model"], "more": torch.ones(1)}},
        "absurd": in_model(absurd),
        "dtype": in_model(other_dtype),
        "shape": in_model(lambda tensor: tensor[None]),
        "sparse": in_model(lambda tensor: torch.eye(2).to_sparse()),
        "number": in_model(lambda tensor: 1.0),
        "momentum-absurd": momentum(absurd),
        "momentum-dtype": momentum(other_dtype),
        "momentum-shape": momentum(lambda tensor: tensor[..., None]),
        "momentum-text": momentum(lambda tensor: "no"),
        "list": lambda found, draw: [found],
        "trap-in-torch": lambda found, draw: {**found, "recipe": Trap()},
        "trap-in-model": lambda found, draw: {**found, "model": {**found["model"], "x": Trap()}},
    }
    return {**{name: resaved(change, path) for name, change in saved.items()}, **not_whole(path)}
