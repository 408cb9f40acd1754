import copy
import functools
import hashlib
import importlib
import json
import pickle
import random
import struct
import sys
from pathlib import Path

import cloudpickle
import pytest
import safetensors.torch
import torch
from torch import nn

from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.registry import ModelReference, reference_of
from sparkdeep.models.saving import read_model, write_model
from sparkdeep.storage.local import LocalStore
from sparkdeep.storage.manifest import FileEntry, decode, encode


class Net(nn.Module):
    def __init__(self, inputs, *, hidden=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(hidden, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


class Mixed(nn.Module):
    """Every dtype, parameters and buffers; built in float32, so that the file's dtype must win."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(2, 3))
        self.scalar = nn.Parameter(torch.tensor(0.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        for name in ("f64", "f16", "bf16", "i64", "i32", "u8", "flag", "c64"):
            self.register_buffer(name, torch.zeros(3))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)


DTYPES = {
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "flag": torch.bool,
    "c64": torch.complex64,
}


class LazyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))

    def forward(self, x):
        return self.layers(x)


class WithExtra(nn.Module):
    extra: object = None

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Linear(1, 1)})

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class Chosen(nn.Module):
    """What a factory argument changes shows in no shape."""

    def __init__(self, sign=1):
        super().__init__()
        self.sign = sign
        self.weight = nn.Parameter(torch.ones(1))


def build_net():
    return Net(3)


def trained(module, inputs=3):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        module(torch.randn(6, inputs)).square().mean().backward()
        optimizer.step()
    return module


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "model")


@pytest.fixture
def saved(store):
    """A trained Net(3, hidden=4), saved."""
    net = trained(Net(3, hidden=4))
    write_model(store, net, reference=reference_of(Net, {"inputs": 3, "hidden": 4}), meta={"columns": ["a", "b"]})
    return net


def assert_same_state(loaded, module):
    ours, theirs = loaded.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


# --- what comes back


def test_a_model_comes_back_bit_for_bit_with_its_metadata(store, saved):
    before = torch.random.get_rng_state()
    loaded, meta = read_model(store)
    assert torch.equal(before, torch.random.get_rng_state())
    assert type(loaded) is Net
    assert meta == {"columns": ["a", "b"]}
    assert_same_state(loaded, saved)
    x = torch.randn(5, 3)
    assert torch.equal(loaded(x), saved.eval()(x))


def test_it_comes_back_in_evaluation_mode_on_the_cpu_and_can_be_trained_on(store, saved):
    loaded, _ = read_model(store)
    assert not any(part.training for part in loaded.modules())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    trained(loaded.train())


def test_saving_does_not_change_the_module(store):
    net = trained(Net(3))
    before = copy.deepcopy(net)
    write_model(store, net, reference=None, meta={})
    assert net.training
    assert_same_state(net, before)


def test_dtypes_shapes_and_strides_survive(store):
    torch.manual_seed(0)
    module = Mixed()
    module.p.data = torch.randn(3, 2, dtype=torch.float64).t()  # not contiguous
    module.scalar.data = torch.tensor(1.5, dtype=torch.bfloat16)
    for name, dtype in DTYPES.items():
        setattr(module, name, torch.tensor([0.1, 1, 2]).to(dtype))
    write_model(store, module, reference=reference_of(Mixed, None), meta={})
    loaded, _ = read_model(store)
    assert_same_state(loaded, module)
    assert loaded.p.dtype == torch.float64
    assert loaded.scalar.dtype == torch.bfloat16
    assert {name: getattr(loaded, name).dtype for name in DTYPES} == DTYPES
    assert isinstance(loaded.p, nn.Parameter)


def test_the_weights_are_a_plain_safetensors_file(store, saved):
    tensors = safetensors.torch.load(store.read("model.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in saved.state_dict().items()
    }


def test_metadata_says_what_lies_there(store, saved):
    body = json.loads(store.read("metadata.json"))["manifest"]
    weights = store.read("model.safetensors")
    assert store.list("") == ["metadata.json", "model.safetensors"]
    assert body["files"] == {
        "model.safetensors": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    }
    assert body["format_version"] == 2
    assert body["reference"] == {"name": f"{__name__}:Net", "args": [], "kwargs": {"inputs": 3, "hidden": 4}}
    assert set(body["versions"]) == {"python", "torch", "sparkdeep"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_tensors_are_stored_once_and_stay_tied(store, dtype):
    module = Tied().to(dtype)
    write_model(store, module, reference=reference_of(Tied, None), meta={})
    assert list(safetensors.torch.load(store.read("model.safetensors"))) == ["embed.weight"]
    assert decode(store.read("metadata.json"))["aliases"] == {"out.weight": "embed.weight"}
    loaded, _ = read_model(store)
    assert_same_state(loaded, module)
    assert loaded.out.weight is loaded.embed.weight
    assert len(list(loaded.parameters())) == 1


def test_tensors_that_only_overlap_are_stored_apart(store):
    module = nn.Module()
    whole = torch.arange(6.0)
    module.register_buffer("whole", whole)
    module.register_buffer("part", whole[:3])
    module.register_buffer("turned", whole.view(2, 3).t())
    module.register_buffer("spread", torch.ones(1).expand(4))
    write_model(store, module, reference=None, meta={})
    target = nn.Module()
    for name, shape in (("whole", (6,)), ("part", (3,)), ("turned", (3, 2)), ("spread", (4,))):
        target.register_buffer(name, torch.zeros(shape))
    loaded, _ = read_model(store, model=target)
    assert_same_state(loaded, module)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factory_may_build_lazy_modules(store, dtype):
    module = LazyNet()
    module(torch.randn(4, 3))
    trained(module)
    module.to(dtype)
    write_model(store, module, reference=reference_of(LazyNet, None), meta={})
    loaded, _ = read_model(store)
    assert_same_state(loaded, module)
    x = torch.randn(5, 3, dtype=dtype)
    assert torch.equal(loaded(x), module.eval()(x))
    assert_same_state(loaded, module)  # the first forward initialized nothing anew


def test_frozen_parameters_are_saved_as_well(store):
    net = Net(3)
    net.head.weight.requires_grad_(False)
    write_model(store, net, reference=None, meta={})
    assert_same_state(read_model(store, model=build_net)[0], net)


def test_an_extra_state_that_is_a_tensor_is_kept(store):
    module = WithExtra()
    module.extra = torch.tensor([1, 2])
    write_model(store, module, reference=None, meta={})
    target = WithExtra()
    target.extra = torch.zeros(2)
    assert torch.equal(read_model(store, model=target)[0].extra, torch.tensor([1, 2]))


# --- what cannot be saved


def assert_refused_unwritten(store, module, message):
    with pytest.raises(ConfigError, match=message):
        write_model(store, module, reference=None, meta={})
    assert store.list("") == []


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_the_format_does_not_hold_is_refused_by_name(store):
    module = WithExtra()
    module.extra = {"a": 1}
    outer = nn.ModuleDict({"part": module})
    assert_refused_unwritten(
        store, outer, r"'part\._extra_state' is a dict, not a tensor; .* let get_extra_state return"
    )
    assert_refused_unwritten(store, LazyNet(), r"'layers\.0\.weight' is not initialized yet \(run a batch")
    assert_refused_unwritten(store, nn.Linear(2, 2, device="meta"), r"'weight' is a torch\.strided .* on meta")
    assert_refused_unwritten(store, nn.Linear(2, 2, dtype=torch.complex128), "torch.complex128")
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(2).to_sparse())
    assert_refused_unwritten(store, sparse, r"'s' is a torch\.sparse_coo")


def test_metadata_that_is_not_json_is_refused_by_key(store):
    with pytest.raises(ConfigError, match=r"meta\['f'\] is builtin_function_or_method, which JSON cannot hold"):
        write_model(store, nn.Linear(1, 1), reference=None, meta={"f": len})
    assert store.list("") == []


# --- where the class comes from


def test_a_model_given_by_the_caller_wins(store, saved):
    calls = []

    def factory():
        calls.append(1)
        return Net(3, hidden=4)

    instance = Net(3, hidden=4)
    for given in (Net, factory, functools.partial(Net, 3, hidden=4), instance, lambda: Net(3, hidden=4)):
        loaded, _ = read_model(store, model=given)
        assert_same_state(loaded, saved)
    assert calls == [1]
    assert read_model(store, model=instance)[0] is instance


def test_a_model_may_be_given_by_name(store):
    net = Net(3)
    write_model(store, net, reference=None, meta={})
    assert_same_state(read_model(store, model=f"{__name__}:build_net")[0], net)
    with pytest.raises(ConfigError, match="cannot be imported"):
        read_model(store, model="no_such_module:x")


@pytest.mark.parametrize("given", [None, Chosen])
def test_stored_arguments_are_passed_to_what_takes_them(store, given):
    write_model(store, Chosen(-1), reference=reference_of(functools.partial(Chosen, -1), None), meta={})
    assert read_model(store, model=given)[0].sign == -1


def test_a_folder_without_a_reference_asks_for_the_class(store):
    write_model(store, Net(3), reference=None, meta={})
    with pytest.raises(
        ModelLoadError, match=r"does not name its model's class: load with model=Net .*trust_pickle=True"
    ):
        read_model(store)
    with pytest.raises(ModelLoadError, match="does not name"):
        read_model(store, trust_pickle=True)  # there is no pickle either


def test_a_pickle_is_used_only_when_trusted(store):
    def closure():
        return Net(3)

    net = Net(3)
    for pickled in (cloudpickle.dumps(closure), cloudpickle.dumps(Net(3))):
        write_model(store, net, reference=None, meta={}, pickled=pickled)
        with pytest.raises(ModelLoadError, match="does not name its model's class"):
            read_model(store)
        assert_same_state(read_model(store, trust_pickle=True)[0], net)
        assert_same_state(read_model(store, model=build_net)[0], net)


def test_a_reference_that_is_refused_falls_back_on_a_trusted_pickle_only(store):
    net = Net(3)
    reference = ModelReference(name="not_imported_here:Net")
    write_model(store, net, reference=reference, meta={}, pickled=cloudpickle.dumps(build_net))
    with pytest.raises(ModelLoadError, match="neither imported here nor listed"):
        read_model(store)
    assert_same_state(read_model(store, trust_pickle=True)[0], net)


def test_a_model_saved_again_replaces_all_of_the_old_one(store, saved):
    write_model(store, saved, reference=None, meta={}, pickled=b"old")
    write_model(store, nn.Linear(2, 2), reference=ModelReference(name="torch.nn:Linear", args=(2, 2)), meta={"new": 1})
    loaded, meta = read_model(store)
    assert isinstance(loaded, nn.Linear)
    assert meta == {"new": 1}
    assert store.list("") == ["metadata.json", "model.safetensors"]


@pytest.mark.fault(rows=[23], phases="CK")
@pytest.mark.parametrize("at", range(1, 6))
def test_a_crash_while_replacing_leaves_no_mixture(store, saved, monkeypatch, at):
    calls = []

    def dying(real):
        def call(self, *args):
            calls.append(1)
            if len(calls) >= at:
                raise OSError(5, "injected")
            return real(self, *args)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "delete"):
            patch.setattr(LocalStore, name, dying(getattr(LocalStore, name)))
        new = nn.Linear(2, 2)
        reference = ModelReference(name="torch.nn:Linear", args=(2, 2))
        if at == 5:
            write_model(store, new, reference=reference, meta={"new": 1})
        else:
            with pytest.raises(OSError, match="injected"):
                write_model(store, new, reference=reference, meta={"new": 1})
    if at == 1:
        assert_same_state(read_model(store)[0], saved)
    elif at == 5:
        assert_same_state(read_model(store)[0], new)
    else:
        with pytest.raises(ModelLoadError, match=r"metadata.json is missing"):
            read_model(store)


# --- what does not fit


def test_tensors_that_do_not_fit_are_listed_by_kind(store, saved):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            self.head = nn.Linear(4, 7)
            self.tail = nn.Linear(1, 1, bias=False)

    target = Other()
    before = copy.deepcopy(target)
    with pytest.raises(ModelLoadError) as raised:
        read_model(store, model=target)
    message = str(raised.value)
    assert "do not fit Other" in message
    assert "missing tail.weight" in message
    assert "head.weight is (2, 4) in the file and (7, 4) in the module" in message
    assert "head.bias is (2,) in the file and (7,) in the module" in message
    assert "unexpected" not in message
    assert_same_state(target, before)  # nothing was half loaded
    with pytest.raises(ModelLoadError, match=r"unexpected body\.0\.bias, body\.0\.weight, body\.1\.bias"):
        read_model(store, model=nn.Identity())


def test_a_long_list_of_faults_is_cut(store):
    write_model(store, nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)]), reference=None, meta={})
    with pytest.raises(ModelLoadError, match=r"unexpected 0\.bias, .* and 30 more\. Load"):
        read_model(store, model=nn.Identity())


def test_a_factory_that_fails_is_named_with_its_arguments(store):
    write_model(store, Net(3), reference=reference_of(Net, {"inputs": "three"}), meta={})
    with pytest.raises(ModelLoadError, match=r"Net\(inputs='three'\) raised TypeError: .*; load with model=") as raised:
        read_model(store)
    assert isinstance(raised.value.__cause__, TypeError)


@pytest.mark.parametrize("given", [lambda: 7, dict])
def test_a_factory_that_builds_something_else_is_refused(store, saved, given):
    with pytest.raises(ModelLoadError, match=r"returned (int|dict), not an nn.Module"):
        read_model(store, model=given)


def test_what_is_no_model_is_refused(store, saved):
    with pytest.raises(ModelLoadError, match=r"model is int: give an nn.Module subclass"):
        read_model(store, model=7)


# --- damage


@pytest.mark.parametrize("name", ["metadata.json", "model.safetensors"])
def test_a_changed_byte_is_detected(store, saved, name):
    path = Path(store.uri) / name
    content = path.read_bytes()
    changes = random.Random(0)
    for _ in range(200):
        place, bits = changes.randrange(len(content)), changes.randrange(1, 256)
        path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
        with pytest.raises(ModelLoadError, match=r"is no intact saved model: .*save it again"):
            read_model(store)
    path.write_bytes(content)
    assert_same_state(read_model(store)[0], saved)


@pytest.mark.parametrize("name", ["metadata.json", "model.safetensors"])
def test_a_cut_or_missing_file_is_named(store, saved, name):
    path = Path(store.uri) / name
    for content in (path.read_bytes()[:-1], path.read_bytes()[:4], b""):
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=f"no intact saved model: {name}"):
            read_model(store)
    path.unlink()
    with pytest.raises(ModelLoadError, match=f"no intact saved model: .*{name} is missing"):
        read_model(store)


def test_an_empty_place_is_no_model(store):
    with pytest.raises(ModelLoadError, match=r"metadata\.json is missing"):
        read_model(store)


# --- files made to do harm


def forge(store, weights=None, **changes):
    """A model folder by hand, whole and with fitting digests."""
    if weights is None:
        weights = safetensors.torch.save({"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    store.write("model.safetensors", weights)
    body = {
        "format_version": 2,
        "reference": {"name": "torch.nn:Linear", "args": [1, 1], "kwargs": {}},
        "aliases": {},
        "meta": {},
        "files": {"model.safetensors": FileEntry.of(weights).to_json()},
    }
    store.write("metadata.json", encode({**body, **changes}))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_the_forgery_is_good_but_for_what_each_test_changes(store):
    forge(store)
    assert isinstance(read_model(store)[0], nn.Linear)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("subprocess:call", ["touch {canary}"], {"shell": True}),
        ("subprocess:check_output", ["touch {canary}"], {"shell": True}),
        ("os:system", ["touch {canary}"], {}),
        ("posix:system", ["touch {canary}"], {}),
        ("builtins:eval", ["open('{canary}', 'w')"], {}),
        ("builtins:exec", ["open('{canary}', 'w')"], {}),
        ("builtins:open", ["{canary}", "w"], {}),
        ("io:open", ["{canary}", "w"], {}),
        ("pathlib:Path.touch", ["{canary}"], {}),
        ("os:mkdir", ["{canary}"], {}),
        ("shutil:copyfile", ["/dev/null", "{canary}"], {}),
        ("sparkdeep.models.registry:import_factory", ["canary_module:x"], {}),
        ("canary_module:Net", [], {}),
        ("canary_module:build", [], {}),
    ],
)
def test_a_stored_name_runs_nothing(store, canary, tmp_path, monkeypatch, name, args, kwargs):
    (tmp_path / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    args = [arg.format(canary=canary) for arg in args]
    forge(store, reference={"name": name, "args": args, "kwargs": kwargs})
    for options in ({}, {"allow_modules": ["somewhere"]}, {"trust_pickle": True}):
        with pytest.raises(ModelLoadError, match="is refused"):
            read_model(store, **options)
    assert not canary.exists()


def test_a_network_of_an_installed_package_is_not_told_what_to_load(store, canary, tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "hub_of_networks.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self, repository):\n"
        "        super().__init__(1, 1)\n        open(repository, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    importlib.import_module("hub_of_networks")  # the session uses it, for whatever purpose
    forge(store, reference={"name": "hub_of_networks:Net", "args": [str(canary)], "kwargs": {}})
    with pytest.raises(ModelLoadError, match="the file gives it texts"):
        read_model(store)
    assert not canary.exists()
    read_model(store, allow_modules=["hub_of_networks"])
    assert canary.exists()
    del sys.modules["hub_of_networks"]


def test_the_canary_would_sing(store, canary, tmp_path, monkeypatch):
    (tmp_path / "canary_module.py").write_text(
        f"from torch import nn\nopen({str(canary)!r}, 'w')\nclass Net(nn.Linear): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    forge(store, reference={"name": "canary_module:Net", "args": [1, 1], "kwargs": {}})
    read_model(store, allow_modules=["canary_module"])
    assert canary.exists()
    canary.unlink()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()


@pytest.mark.fault(rows=[26], phases="RS")
def test_a_pickle_in_place_of_the_weights_or_the_metadata_is_not_run(store, canary):
    bomb = pickle.dumps(Bomb(canary))
    forge(store, weights=bomb)
    with pytest.raises(ModelLoadError, match=r"model.safetensors is no safetensors file"):
        read_model(store, trust_pickle=True)
    torch.save({"weight": Bomb(canary)}, Path(store.uri) / "zip")
    forge(store, weights=store.read("zip"))
    with pytest.raises(ModelLoadError, match=r"model.safetensors is no safetensors file"):
        read_model(store, trust_pickle=True)
    forge(store)
    store.write("metadata.json", bomb)
    with pytest.raises(ModelLoadError, match=r"metadata\.json: it is not a manifest"):
        read_model(store, trust_pickle=True)
    assert not canary.exists()


def test_a_pickle_beside_the_model_is_not_run_unless_it_is_needed_trusted_and_whole(store, canary):
    bomb = pickle.dumps(Bomb(canary))
    store.write("model.pkl", bomb)
    forge(store)
    read_model(store, trust_pickle=True)  # not listed in the metadata, and not needed
    forge(store, reference=None)
    with pytest.raises(ModelLoadError, match="does not name"):
        read_model(store, trust_pickle=True)
    weights = FileEntry.of(store.read("model.safetensors")).to_json()
    entry = {**FileEntry.of(bomb).to_json(), "sha256": "0" * 64}
    forge(store, reference=None, files={"model.safetensors": weights, "model.pkl": entry})
    with pytest.raises(ModelLoadError, match=r"model.pkl does not have the SHA-256"):
        read_model(store, trust_pickle=True)
    forge(store, reference=None, files={"model.safetensors": weights, "model.pkl": FileEntry.of(bomb).to_json()})
    with pytest.raises(ModelLoadError):
        read_model(store)
    assert not canary.exists()


def header(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\0" * 7,
        header(b"{}", 2**63),
        header(b"{}", 2**64 - 1),
        header(b"{}", 100_000_000),
        header(b"{}", 3),
        header(b"[" * 1_000_000),
        header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        header(b'{"weight":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}') + b"\0" * 4,
        header(b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,1099511627776]}}') + b"\0" * 4,
        header(b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
        header(b'{"weight":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}') + b"\0" * 4,
        header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
        + b"\0" * 4,
        header(b"not json"),
        header(b"\xff\xfe"),
    ],
    ids=lambda weights: repr(weights[:24]),
)
@pytest.mark.fault(rows=[26], phases="RS")
def test_a_header_bomb_is_refused(store, weights):
    forge(store, weights=weights)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is no safetensors file"):
        read_model(store)


def test_a_header_longer_than_the_bound_is_refused_before_it_is_parsed(store, monkeypatch):
    monkeypatch.setattr("sparkdeep.models.saving.MAX_HEADER_BYTES", 1000)
    forge(store, weights=header(b"{}" + b" " * 999))
    with pytest.raises(ModelLoadError, match="its header is said to have 1001 bytes"):
        read_model(store)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": []},
        {"files": {"model.safetensors": {"bytes": 2**62, "sha256": "0" * 64}}},
        {"files": {"model.safetensors": {"bytes": True, "sha256": "0" * 64}}},
        {"files": {"model.safetensors": "x"}},
        {"aliases": []},
        {"aliases": {"weight": "bias"}},
        {"aliases": {"other": "nothing"}},
        {"aliases": {"other": 7}},
        {"meta": None},
        {"reference": "torch.nn:Linear"},
        {"reference": {"name": "torch.nn:Linear", "args": [[1], 1], "kwargs": {}}},
        {"reference": {"name": "torch.nn:Linear", "args": [], "kwargs": {"in_features": {"a": 1}}}},
        {"format_version": 1},
        {"format_version": None},
        {"aliases": {"extra": "weight"}},
    ],
)
@pytest.mark.fault(rows=[26], phases="RS")
def test_forged_metadata_is_refused(store, changes):
    forge(store, **changes)
    with pytest.raises(ModelLoadError):
        read_model(store)
