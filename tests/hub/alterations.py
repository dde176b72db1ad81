"""Ways to alter a file of a chain at random: JSON, bytes, the header of a safetensors file."""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from hostile import COMMIT, joined, split

KINDS = (
    "manifest", "manifest", "axis map", "claims", "config", "config", "header", "header", "data", "index maps",
    "index maps", "checksums", "generation config", "calibration", "manifest",
)  # fmt: skip
"""What is altered, in turn."""

DEEP = ("@100@", "@300@", "@450@", "@700@", "@950@", "@5000@")
"""Stand for lists within lists, of that depth: Python's own writer could not write them all."""

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 127, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", "a", "0", "1", "\n", "a\nb", "\0", "é",
    "\ud800", "../x", "/etc/passwd", "..", ".", "http://127.0.0.1:9/x", "x" * 300, "x" * 5000, "0" * 64, COMMIT,
    "float16", "F32", "load", "hidden", "hidden 2", "(2 hidden)", "(hidden + ffn)", "0 hidden", "heads",
    "vocab hidden", "model.norm.weight", "a0", "a1", "owner/name", [], [[]], [0], [0, 1, 2], [None], ["a"],
    [1.5, "x"], {}, {"a": 1}, {"": {}}, [0] * 300, *DEEP,
]  # fmt: skip
"""Values of every type that nobody expects."""

KEYS = [
    "auto_map", "quantization_config", "configuration_files", "attn_implementation", "_attn_implementation",
    "num_labels", "id2label", "dtype", "torch_dtype", "per_layer_config", "layer_types", "no_rope_layers",
    "attribute_map", "sub_configs", "to_dict", "__class__", "__dict__", "self", "cls", "kwargs", "model_type",
    "architectures", "is_encoder_decoder", "rope_parameters", "rope_scaling", "pad_token_id", "head_dim", "hidden_act",
    "use_cache", "_name_or_path", "cbd_hub", "tie_word_embeddings", "num_experts", "pruned_heads", "fusion_config",
    "transformers_weights", "__metadata__", "sliding_window", "mlp_bias", "pretraining_tp", "base_model_tp_plan",
    "distributed_config", "__float__", "output_attentions", "problem_type", "rms_norm_eps", "max_position_embeddings",
    "revision", "repo_id", "subfolder", "parent", "format", "a0", "a9", "", "a\nb", "é",
]  # fmt: skip
"""Keys that mean something to somebody."""

DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F4 I64 I32 I8 U8 U64 BOOL C64 f32 X".split()

LEGITIMATE = {"aligned", "training", "layer_order", "layers_last"}
"""Fields that a manifest may state otherwise, and then means another model."""


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path of a JSON value but the empty one."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths_of(child, (*path, key))


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def differences(one: Any, other: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), (*path, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, (*path, i))
    elif one != other:
        yield path


def dumped(value: Any) -> bytes:
    """JSON, with the lists that Python could not write."""
    text = json.dumps(value)
    for deep in DEEP:
        text = text.replace(f'"{deep}"', "[" * int(deep[1:-1]) + "]" * int(deep[1:-1]))
    return text.encode()


def alter_json(data: Any, draw: random.Random) -> tuple[str, bytes]:
    """Alters one place of a JSON value, in place; returns what was done, and the new text."""
    path = draw.choice(list(paths_of(data)))
    parent, last = parent_of(data, path), path[-1]
    value, where = parent[last], ".".join(map(str, path))
    action = draw.choice("replace replace delete rename twice swap number number insert string".split())
    if action == "number" and isinstance(value, int):
        parent[last] = draw.choice([value - 1, value + 1, value * 2, value * 8, 2**31, 2**62, -1, 0, -value])
    elif action == "string" and isinstance(value, str):
        options = [
            value + "x",
            value[:-1],
            value.upper(),
            "\n" + value,
            value + "\0",
            value.replace("*", "0"),
            2 * value,
        ]
        parent[last] = draw.choice(options)
    elif action == "delete":
        del parent[last]
        return f"{where} deleted", dumped(data)
    elif action == "rename" and isinstance(parent, dict):
        name = draw.choice([str(last) + "_", str(last).upper(), "x", *draw.sample(KEYS, 2), draw.choice(list(parent))])
        parent[name] = parent.pop(last)
        return f"{where} renamed to {name!a}", dumped(data)
    elif action == "insert" and isinstance(parent, dict):
        name = draw.choice(KEYS)
        parent[name] = draw.choice(HOSTILE)
        return f"beside {where}: {name!r} as {ascii(parent[name])[:80]}", dumped(data)
    elif action == "twice" and isinstance(parent, dict):
        other, first, rest = draw.choice(HOSTILE), draw.random() < 0.5, dict(parent)
        parent.clear()
        parent.update({"@twice@": other, **rest} if first else {**rest, "@twice@": other})
        text = dumped(data).replace(b'"@twice@"', json.dumps(str(last)).encode())
        return f"{where} {'preceded' if first else 'followed'} by itself as {ascii(other)[:80]}", text
    elif action == "swap" and (others := [p for p in paths_of(data) if p[: len(path)] != path[: len(p)]]):
        alike = [p for p in others if type(parent_of(data, p)[p[-1]]) is type(value)]
        other_path = draw.choice(alike if alike and draw.random() < 0.8 else others)
        other_parent = parent_of(data, other_path)
        parent[last], other_parent[other_path[-1]] = other_parent[other_path[-1]], value
        return f"{where} swapped with {'.'.join(map(str, other_path))}", dumped(data)
    else:
        parent[last] = draw.choice(HOSTILE)
    return f"{where}: {ascii(value)[:80]} becomes {ascii(parent[last])[:80]}", dumped(data)


def alter_bytes(data: bytes, draw: random.Random, start: int = 0, stop: int | None = None) -> tuple[str, bytes]:
    """Flips, deletes, inserts or cuts some bytes between two offsets."""
    changed, done = bytearray(data), []
    for _ in range(draw.randint(1, 3)):
        end = min(len(data) if stop is None else stop, len(changed))
        if start >= end:
            break
        place, action = draw.randrange(start, end), draw.choice("flip set set delete insert cut extend".split())
        if action == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif action == "set":
            changed[place] = draw.choice([draw.randrange(256), *b'0123456789{}[],:"- '])
        elif action == "delete":
            del changed[place : place + draw.choice([1, 1, 8])]
        elif action == "insert":
            changed[place:place] = draw.randbytes(draw.choice([1, 4, 8]))
        elif action == "cut":
            del changed[place:end]
        else:
            changed += draw.randbytes(draw.choice([1, 4, 100]))
        done.append(f"{action} at {place}")
    return ", ".join(done), bytes(changed)


def alter_header(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Alters the header of a safetensors file, or the file around it."""
    header, body = split(data)
    length = len(data) - len(body) - 8
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    entry: Any = header[one]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    action = draw.choice([
        "dtype", "shape", "offsets", "swap entries", "swap offsets", "swap alike", "remove", "add", "metadata", "json",
        "bytes", "length", "append", "truncate", "rename", "order",
    ])  # fmt: skip
    match action:
        case "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        case "shape":
            entry["shape"] = draw.choice([
                shape[::-1], [*shape, 1], shape[:-1], [2 * n for n in shape], [*shape, 0], [-n for n in shape],
                [n + draw.choice([-1, 1]) for n in shape], [float(n) for n in shape], [True], "12", 5, {}, [2**62],
                [*shape, 2**31], [str(n) for n in shape], [[n] for n in shape], [int(np.prod(shape))], [1] * 100,
            ])  # fmt: skip
        case "offsets":
            entry["data_offsets"] = draw.choice([
                [start + 4, stop], [start, stop + 4], [start, stop - 4], [start + 4, stop + 4], [stop, start], {},
                [-4, stop], [start], [start, stop, stop], [2**63, 2**63 + 4], [float(start), stop], None, [0, 2**62],
                [start - 1, stop - 1], [start, start], [[start], stop], "12",
            ])  # fmt: skip
        case "swap entries":
            header[one], header[other] = header[other], header[one]
        case "swap offsets":
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], [start, stop]
        case "swap alike":  # tensors of one shape, where there are such
            other = draw.choice([name for name in names if header[name]["shape"] == shape])
            header[one], header[other] = header[other], header[one]
        case "remove":
            del header[one]
        case "add":
            size = draw.choice([0, 4, 2**31, 2**62])
            added = {"dtype": draw.choice(DTYPES), "shape": [size // 4], "data_offsets": [len(body), len(body) + size]}
            header[draw.choice([one + "x", "lm_head.weight", "a1/order/layers", "x/y/z", "\ud800", *KEYS])] = added
            body += bytes(size if size < 100 else 0)
        case "metadata":
            header["__metadata__"] = draw.choice(HOSTILE)
        case "json":
            what, text = alter_json(header, draw)
            return what, joined(text, body)
        case "bytes":
            return alter_bytes(data, draw, 8, 8 + length)
        case "length":
            new = draw.choice([0, 1, length - 1, length + 1, 2 * length, len(data), 2**31, 2**62, 2**63, 2**64 - 1])
            return f"length {length} becomes {new}", struct.pack("<Q", new) + data[8:]
        case "append":
            return "bytes appended", data + draw.randbytes(draw.choice([1, 4, 8, 1000]))
        case "truncate":
            end = draw.choice([0, 7, 8, 9, 8 + length, len(data) - 4, len(data) - 1, draw.randrange(len(data))])
            return f"cut to {end} bytes", data[:end]
        case "rename":
            options = [one + "x", one.upper(), other + ".", one.replace("0", "00"), one.replace("1", "9"), ""]
            header[draw.choice(options)] = header.pop(one)
        case "order":
            header = dict(draw.sample(sorted(header.items()), len(header)))
    text = dumped(header)
    if draw.random() < 0.5:  # as long as it was, so that the size of the file says nothing
        text += b" " * (length - len(text))
    return f"{action} of {one!r}" + (f" and {other!r}" if "swap" in action else ""), joined(text, body)
