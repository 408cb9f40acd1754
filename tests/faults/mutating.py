"""Seeded mutations: of raw bytes, and of what stands in them (JSON, safetensors, frames)."""

from __future__ import annotations

import copy
import itertools
import json
import pickletools
import struct

from sparkdeep.tensors.encoding import CHECKSUM_BYTES, Checksum

LONGEST = 1 << 16
"""Mutants of raw bytes are cut to this many, so that one input costs milliseconds."""

NUMBERS = [
    *[0, 1, -1, 2, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62],
    *[2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), -(2**64), 10**30, 10**400, -(10**400)],
    *[0.5, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")],
]
TEXTS = [
    *["", " ", "\0", "a", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", ".tmp-1", "\ud800"],
    *["x" * 5000, "é" * 300, "-1", "0", "nan", "inf", "1e999", "²", "٣", "true", "null", "None", "\n", "\r", "%s{0}"],
    *[
        "float32",
        "float64",
        "bfloat16",
        "int64",
        "bool",
        "object",
        "O",
        "V0",
        "U4",
        "M8[ns]",
        "i4,f8",
        "decoded",
        ">f4",
    ],
    *["F32", "BF16", "I64", "F8_E4M3", "torch.nn:Linear", "torch.nn:Module", "os:system", "builtins:eval", "kind"],
]
# json.dumps would refuse to nest these, or to write them; they stand for their text until it is written.
_DEEP, _LONG = "@deep@", "@long@"
_DEPTHS = (3, 60, 400, 2000, 20_000)


def mutate_bytes(rng, data):
    """1 to 4 changes of bytes; also the start of what a truncated, doubled or foreign file looks like."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 16, 64))
        match rng.randrange(10):
            case 0 | 1 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 2 if out:
                out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = rng.randbytes(size)
            case 5:
                del out[at:]
            case 6:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice([n for n in NUMBERS if isinstance(n, int)]) & ((1 << 8 * width) - 1)
                out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 7:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.choice((8, 64, 512))]
            case 8:
                out[at : at + size] = rng.randbytes(size)
            case _:
                out[at:at] = rng.choice((b"\xff", b"\xed\xa0\x80", b"[" * 5000, b"{", b'"', b"\0", b"9" * 5000, b"\n"))
    return bytes(out[:LONGEST])


def mutate_text(rng, text):
    """As `mutate_bytes`, for what a user types: any text, surrogates included."""
    if rng.random() < 0.2:
        return rng.choice(TEXTS)
    if rng.random() < 0.2:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice([*TEXTS, *(str(n) for n in NUMBERS)]) + text[at + rng.randrange(3) :]
    return mutate_bytes(rng, text.encode("utf-8", "surrogatepass")).decode(
        "utf-8", rng.choice(("surrogateescape", "replace"))
    )


# -- JSON -------------------------------------------------------------------------------------------------------------


def atom(rng):
    """A value that few readers expect."""
    match rng.randrange(8):
        case 0 | 1 | 2:
            return rng.choice(NUMBERS)
        case 3 | 4:
            return rng.choice(TEXTS)
        case 5:
            return rng.choice((None, True, False))
        case 6:
            return rng.choice(([], {}, [[]], {"": 0}, [None, 1, "a"], [0] * 9))
        case _:
            return rng.choice((f"{_DEEP}{rng.choice(_DEPTHS)}", _LONG))


def mutate_json(rng, document):
    """A copy with one value, key or element changed, anywhere in the document."""
    holder = [copy.deepcopy(document)]
    places = [(holder, 0)]
    for parent, key in places:  # grows while it is walked
        value = parent[key]
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, k) for k in keys]
    parent, key = rng.choice(places)
    match rng.randrange(7):
        case 0 if parent is not holder:
            del parent[key]
        case 1 if isinstance(parent[key], dict):
            parent[key][rng.choice(TEXTS)] = atom(rng)
        case 2 if isinstance(parent[key], list):
            parent[key].insert(rng.randrange(len(parent[key]) + 1), rng.choice([atom(rng), *parent[key]]))
        case 3 if isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        case 4:
            other, there = rng.choice(places)
            parent[key] = copy.deepcopy(other[there])
        case 5 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = rng.choice(
                (parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 1000, str(parent[key]))
            )
        case _:
            parent[key] = atom(rng)
    return holder[0]


def json_text(document):
    """The document as JSON, with what `atom` could only name written out."""
    text = json.dumps(document)
    text = text.replace(f'"{_LONG}"', "9" * 5000)
    for depth in _DEPTHS:
        text = text.replace(f'"{_DEEP}{depth}"', "[" * depth + "]" * depth)
    return text.encode()


def mutate_json_text(rng, data):
    """JSON bytes: mostly changed as a document, now and then as bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = mutate_json(rng, document)
    return json_text(document)


# -- safetensors --------------------------------------------------------------------------------------------------------

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}


def mutate_tensors(rng, data):
    """A safetensors file; half of the mutants satisfy the format, and differ in what it holds."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.3:
        text = json_text(mutate_json(rng, header))
        told = rng.choice((len(text), len(text), len(text), rng.choice([n for n in NUMBERS if type(n) is int]) % 2**64))
        return struct.pack("<Q", told) + text + body
    entries = {
        name: [e["dtype"], e["shape"], body[slice(*e["data_offsets"])]]
        for name, e in header.items()
        if name != "__metadata__"
    }
    for _ in range(rng.choice((1, 1, 2))):
        _mutate_entries(rng, entries)
    return _tensors(entries)


def _mutate_entries(rng, entries):
    if not entries:
        entries["x"] = ["F32", [], bytes(4)]
    name = rng.choice(list(entries))
    dtype, shape, data = entries[name]
    match rng.randrange(6):
        case 0:
            entries[rng.choice([*TEXTS, *(f"{name}{s}" for s in ("#values", "#lengths", "x"))])] = entries.pop(name)
        case 1:
            del entries[name]
        case 2:
            dtype = rng.choice(list(_SIZES))
            shape = rng.choice(([], [1], [3], [0], [2, 2], [0, 2**40], [1] * 70))
            count = 1
            for n in shape:
                count *= n
            entries[name] = [dtype, shape, rng.randbytes(count * _SIZES[dtype])]
        case 3 if data:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 9)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            entries[name] = [dtype, shape, bytes(changed)]
        case _ if "__tree__" in entries:
            try:
                text = mutate_json_text(rng, entries["__tree__"][2])
            except (ValueError, RecursionError):  # it was changed before, and is no JSON any more
                text = b"{}"
            entries["__tree__"] = ["U8", [len(text)], text]
        case _:
            entries[name] = [dtype, list(reversed(shape)), data]


def _tensors(entries):
    header, body = {}, b""
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json_text(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# -- pickles ------------------------------------------------------------------------------------------------------------

_NAMES = [
    *["numpy dtype", "numpy float32", "numpy str_", "numpy float128", "builtins str", "builtins tuple", "os system"],
    *["petastorm.unischema Unischema", "petastorm.unischema UnischemaField", "petastorm.codecs NdarrayCodec"],
    *["copy_reg _reconstructor", "copyreg __newobj__", "collections OrderedDict", "numpy.core.multiarray scalar"],
    *["pyspark.sql.types IntegerType", "pyspark.serializers _restore", "_codecs encode", "decimal Decimal"],
]


def mutate_pickle(rng, data):
    """A pickle whose opcodes are changed: left out, repeated, moved, or with another name or string; or its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    starts = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts[at] = b""
            case 1:
                parts[at] *= rng.choice((2, 3, 50, 3000))
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = parts[other]
            case 4:
                named = [i for i, part in enumerate(parts) if part[:1] == b"c"] or [at]
                parts[rng.choice(named)] = b"c" + rng.choice(_NAMES).replace(" ", "\n").encode() + b"\n"
            case _:
                text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
                number = rng.choice([n for n in NUMBERS if type(n) is int]) % 2**63
                made = [b"X" + struct.pack("<I", len(text)) + text, b"\x8a\x08" + number.to_bytes(8, "little")]
                parts[at] = rng.choice([*made, b"N", b"(", b"}", b"\x85", b"0"])
    return b"".join(parts)


# -- frames -------------------------------------------------------------------------------------------------------------

PREFIX = struct.Struct(">4s32sIQ")


def frame(token, kind, header=None, body=b"", *, announced=None):
    """One frame as bytes; its head may announce a body of another length than it has."""
    text = json_text({**(header or {}), "kind": kind})
    return PREFIX.pack(b"SPD1", token, len(text), len(body) if announced is None else announced) + text + body


def with_checksum(data):
    """A body that ends in its checksum."""
    return data + Checksum(data).digest()


def frames_of(data):
    """(header, body) of each frame of a valid script."""
    found, at = [], 0
    while at < len(data):
        _, _, head, body = PREFIX.unpack_from(data, at)
        at += PREFIX.size
        found.append((json.loads(data[at : at + head]), data[at + head : at + head + body]))
        at += head + body
    return found


def mutate_frames(rng, data, token, *, start=0):
    """Several frames in a row: one or two of them changed in header, body, length, order or number; those before `start` stay."""
    if rng.random() < 0.08:
        return mutate_bytes(rng, data)
    parts = [PREFIX.pack(b"SPD1", token, len(t := json_text(h)), len(b)) + t + b for h, b in frames_of(data)]
    whole = frames_of(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        at = rng.randrange(min(start, len(whole) - 1), len(whole))
        header, body = whole[at]
        told = None
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                header = mutate_json(rng, header)
            case 4 | 5 if body:
                checked = len(body) > CHECKSUM_BYTES and with_checksum(body[:-CHECKSUM_BYTES]) == body
                changed = _mutate_body(rng, body[:-CHECKSUM_BYTES] if checked else body)
                changed = with_checksum(changed) if checked else changed
                for name in ("buffer_bytes", "tensor_bytes"):  # so that what is changed is read as what it was
                    if header.get(name):
                        header[name] += len(changed) - len(body)
                body = changed
            case 6:
                told = rng.choice(
                    (0, 1, len(body) + 1, max(0, len(body) - 1), 2**20, 2**34, 2**36, 2**40, 2**63, 2**64 - 1)
                )
            case 7:
                parts[at] = b"" if rng.random() < 0.5 else parts[at] * 2
                continue
            case 8:
                other = rng.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
                continue
            case _:
                parts[at] = mutate_bytes(rng, parts[at])
                continue
        text = json_text(header)
        parts[at] = PREFIX.pack(b"SPD1", token, len(text), len(body) if told is None else told) + text + body
    return b"".join(parts)


def _mutate_body(rng, body):
    """A body's safetensors part, if it ends or begins with one, or its bytes; mostly of the same length."""
    at = body.find(b'{"')
    if at >= 8 and rng.random() < 0.7:
        changed = mutate_tensors(rng, body[at - 8 :])
        return body[: at - 8] + changed
    return mutate_bytes(rng, body)
