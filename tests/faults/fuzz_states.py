"""Targets that a run or a model is loaded from: checkpoints, model folders, replica states, stored settings."""

from __future__ import annotations

import json
from functools import partial

import torch
from fuzz_files import lay_down, picked_up
from fuzz_lines import BUFFERS, LAYOUT, hello, net, update
from fuzz_replica import ReplicaEnd
from fuzzing import Target
from mutating import json_text, mutate_bytes, mutate_json, mutate_json_text, mutate_tensors
from safetensors.torch import save
from torch import nn

from sparkdeep.models.program import Program
from sparkdeep.models.registry import ModelReference
from sparkdeep.models.saving import read_model, write_model
from sparkdeep.protocol.messages import Failure, Hello, Open, Opened, Saved, ShardFacts, Update, parse
from sparkdeep.rounds.generation import Generation
from sparkdeep.rounds.inner_rates import InnerRates
from sparkdeep.rounds.run_state import Best, RunState
from sparkdeep.rounds.transport import Snapshot
from sparkdeep.settings.run import EarlyStopping, LocalSettings, RunSettings
from sparkdeep.spark.model.stored_values import from_json, to_json
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.disks import StateFiles
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.manifest import FileEntry, decode, encode
from sparkdeep.tensors.state_dicts import pack, pack_tensors, unpack, unpack_tensors

IDENTITY = {"schema": {"features": 2}, "seed": 0}
RATES = InnerRates(Program(model=net(), loss=nn.MSELoss(), optimizer=partial(torch.optim.SGD, lr=0.1)))


def run_state():
    """After two rounds, with a best one."""
    from fuzz_files import records

    parameters = LAYOUT.empty().zero_()
    best = Best(round=1, score=0.5, parameters=parameters.clone(), buffers=BUFFERS)
    return RunState(
        parameters=parameters,
        buffers=BUFFERS,
        generation=generation(),
        consumed=[0],
        rates=RATES,
        committed=2,
        best=best,
        records=records(),
    )


LOCAL, SETTINGS = LocalSettings(), RunSettings(num_workers=1)


def generation():
    """One replica of two rows."""
    facts = ShardFacts(rows={"train": 2, "validation": 0}, digest="0" * 32)
    return Generation.over([facts], LOCAL, SETTINGS)


def checkpoint_files(folder, replica_state):
    """A checkpoint folder with two committed rounds."""
    directory = CheckpointDirectory(LocalStore(folder), identity=IDENTITY)
    files = run_state().to_files(LAYOUT, {"state": {0: {"momentum": torch.zeros(2)}}}, [replica_state])
    for number in (1, 2):
        directory.save(number, files, {"round": number})
    return picked_up(folder)


def read_checkpoint(folder, files):
    """The newest intact round, and the run's state from it."""
    import warnings

    lay_down(folder, files)
    directory = CheckpointDirectory(LocalStore(folder), identity=IDENTITY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it says which commits are damaged
        loaded = directory.latest()
    if loaded is None:
        return
    state = RunState(parameters=LAYOUT.empty(), buffers=BUFFERS, generation=generation(), consumed=[0], rates=RATES)
    state.restore(LAYOUT, loaded.files, LOCAL, SETTINGS)
    Snapshot(round=loaded.round_number, files=loaded.files).replica(0)
    state.to_files(LAYOUT, {}, [])


def mutate_checkpoint(rng, files):
    """A file changed and its digest made anew, or the commit changed and its digest made anew, or bytes."""
    files = dict(files)
    commit = rng.choice(sorted(name for name in files if name.startswith("commits/")))
    if rng.random() < 0.1:
        name = rng.choice(sorted(files))
        files[name] = mutate_bytes(rng, files[name])
        return files
    body = decode(files[commit])
    if rng.random() < 0.4:
        body = mutate_json(rng, body)
    else:
        name = rng.choice(sorted(body["files"]))
        changed = mutate_tensors(rng, files[f"{body['prefix']}/{name}"])
        files[f"{body['prefix']}/{name}"] = changed
        body["files"][name] = FileEntry.of(changed).to_json()
    files[commit] = encode(body)
    if rng.random() < 0.7:  # so that the changed one is the newest
        other = max(name for name in files if name.startswith("commits/"))
        if commit != other:
            del files[other]
    return files


def checkpoint_cases(folder):
    """A whole checkpoint whose files, digests and all, are of another make."""
    files = picked_up(folder)
    run = unpack(next(data for name, data in files.items() if name.endswith("run.safetensors")))
    made = []
    for changed in (
        {"run.safetensors": pack({**run, "committed": "x"})},
        {"run.safetensors": pack({**run, "buffers": {}})},
        {"run.safetensors": pack({**run, "best": {"round": 1}})},
        {"run.safetensors": pack({**run, "records": [{"round": 1, "x": 2}]})},
        {"run.safetensors": pack({**run, "sections": ["a", "b"]})},
        {"run.safetensors": pack(3)},
        {"parameters.safetensors": pack({})},
        {"parameters.safetensors": pack({name: torch.zeros(9) for name in ("0.weight", "0.bias")})},
        {"parameters.safetensors": None},
    ):
        newest = max(name for name in files if name.startswith("commits/"))
        body = decode(files[newest])
        whole = dict(files)
        for name, data in changed.items():
            if data is None:
                del body["files"][name]
                continue
            whole[f"{body['prefix']}/{name}"] = data
            body["files"][name] = FileEntry.of(data).to_json()
        made.append({**whole, newest: encode(body)})
    return made


def model_cases(folder):
    """Stored arguments that ask for 48 GB, and a name that the rules refuse."""
    files = picked_up(folder)
    body = decode(files["metadata.json"])
    large = {"name": "torch.nn:Linear", "args": [], "kwargs": {"in_features": 3, "out_features": 1 << 32}}
    foreign = {"name": "os:system", "args": ["true"], "kwargs": {}}
    return [{**files, "metadata.json": encode({**body, "reference": one})} for one in (large, foreign)]


def model_files(folder):
    """A model folder that names a class of torch with its arguments."""
    reference = ModelReference(name="torch.nn:Linear", kwargs={"in_features": 3, "out_features": 2})
    write_model(LocalStore(folder), nn.Linear(3, 2), reference=reference, meta={"a": [1, {"b": None}]})
    return picked_up(folder)


def mutate_model(rng, files):
    """As `mutate_checkpoint`."""
    files = dict(files)
    if rng.random() < 0.15:
        name = rng.choice(sorted(files))
        files[name] = mutate_bytes(rng, files[name])
        return files
    body = decode(files["metadata.json"])
    if rng.random() < 0.6:
        body = mutate_json(rng, body)
    else:
        files["model.safetensors"] = mutate_tensors(rng, files["model.safetensors"])
        body["files"]["model.safetensors"] = FileEntry.of(files["model.safetensors"]).to_json()
    files["metadata.json"] = encode(body)
    return files


def read_model_folder(folder, files):
    """Load it, by the reference that it names and into a class that the caller gives."""
    lay_down(folder, files)
    read_model(LocalStore(folder), model=nn.Linear(3, 2))
    read_model(LocalStore(folder))


def read_state_file(folder, replica, data):
    """A replica's state from the executor's disk, and a round's start with it."""
    lay_down(folder, {"round-000000001.stage.safetensors": data})
    replica.load(StateFiles(folder, "stage").read(1, "stage"))


MESSAGES = {cls.__name__: cls for cls in (Hello, Open, Opened, Update, Saved, Failure)}


def messages():
    """A header of each kind that has one."""
    failure = {"cause": "user", "message": "m", "traceback": "t", "where": "w"}
    open_ = {"committed": 0, "scheduler_steps": 0, "state": "fresh", "tensor_bytes": 0, "keep": True}
    open_ |= {"kept_round": 0, "kept_by": ""}
    made = [("Hello", hello()), ("Open", open_), ("Opened", {"state": "fresh"}), ("Update", update(b""))]
    made += [("Saved", {"bytes": 0, "seconds": 0.5}), ("Failure", failure)]
    return [json.dumps(one).encode() for one in made]


def read_message(data):
    """As `Connection.receive` and its callers do: JSON, then a typed header, then words about it."""
    try:
        name, header = json.loads(data)
    except (ValueError, RecursionError, TypeError):
        return
    if isinstance(name, str) and name in MESSAGES and isinstance(header, dict):
        f"{parse(MESSAGES[name], header)}".encode("utf-8", "backslashreplace")


def settings():
    """Settings of an estimator as a model folder keeps them."""
    values = {
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "loss": nn.CrossEntropyLoss(label_smoothing=0.1),
        "stop": EarlyStopping(patience=2),
        "cols": ["a", ("b", 1.5, None)],
        "model_args": {"hidden": 4},
    }
    return [json.dumps(to_json(value, name)).encode() for name, value in values.items()]


def read_setting(data):
    """One setting."""
    try:
        stored = json.loads(data)
    except (ValueError, RecursionError):
        return
    from_json(stored, "setting")


def targets(folder):
    """Those of this file."""
    replica = ReplicaEnd(folder / "for-states")
    deep = "x"
    for _ in range(600):
        deep = [deep]
    large = [deep, {"module": "torch.nn:Linear", "kwargs": {"in_features": 3, "out_features": 1 << 32}}]
    tree = pack({"a": [1, 2.5, None, "x"], "b": (torch.arange(3), {1: torch.rand(2, 2)}), "c": {3, 4}})
    return [
        Target(
            name="checkpoint",
            seeds=[checkpoint_files(folder / "checkpoint-made", replica.state)],
            cases=checkpoint_cases(folder / "checkpoint-made"),
            mutate=mutate_checkpoint,
            read=partial(read_checkpoint, folder / "checkpoint"),
            share=2.0,
        ),
        Target(
            name="model-folder",
            seeds=[model_files(folder / "model-made")],
            cases=model_cases(folder / "model-made"),
            mutate=mutate_model,
            read=partial(read_model_folder, folder / "model"),
            share=2.0,
        ),
        Target(
            name="tree",
            seeds=[tree],
            cases=[save({"__tree__": torch.tensor(10**12)}), b""],
            mutate=mutate_tensors,
            read=unpack,
        ),
        Target(
            name="tensors",
            seeds=[pack_tensors(dict(net().named_parameters())), pack_tensors({})],
            mutate=mutate_tensors,
            read=unpack_tensors,
        ),
        Target(
            name="replica-state",
            seeds=[replica.state],
            mutate=mutate_tensors,
            read=partial(read_state_file, folder / "states-made", replica),
        ),
        Target(
            name="messages",
            seeds=messages(),
            cases=[json_text(["Saved", {"bytes": 0, "seconds": 10**400}])],
            mutate=mutate_json_text,
            read=read_message,
        ),
        Target(
            name="stored-settings",
            seeds=settings(),
            cases=[*map(json_text, large)],
            mutate=mutate_json_text,
            read=read_setting,
        ),
    ]
