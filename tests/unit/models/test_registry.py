import enum
import functools
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import sparkdeep
from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models import registry
from sparkdeep.models.registry import ModelReference, import_factory, reference_of, register, resolve

HERE = __name__


class Net(nn.Module):
    def __init__(self, hidden=4, *, act="relu", rate=0.5):
        super().__init__()
        self.first = nn.Linear(3, hidden)
        self.act = act
        self.drop = nn.Dropout(rate)


class NeedsArgs(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.first = nn.Linear(3, hidden)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LazyLinear(3)


class Recurrent(nn.Module):
    def __init__(self, layers=1):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=layers)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))


class Descriptor:
    def __get__(self, instance, owner):
        raise AssertionError("a descriptor ran")


class Holder:
    class Inner(nn.Module):
        pass

    descriptor = Descriptor()

    @property
    def trap(self):
        raise AssertionError("a property ran")

    @staticmethod
    def static():
        raise AssertionError("a static method ran")


def build(hidden=4):
    return Net(hidden)


not_a_factory = 7


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def fresh_modules(tmp_path, monkeypatch):
    """Packages on the path that nobody has imported; importing one leaves a canary."""
    for package in ("fresh_pkg", "fresh_pkg_other"):
        folder = tmp_path / package / "sub"
        folder.mkdir(parents=True)
        canary = f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        (tmp_path / package / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(canary)
        (folder / "nets.py").write_text(
            "import subprocess\nfrom subprocess import check_output\nfrom os import system\nfrom torch import nn\n"
            "class Net(nn.Module): pass\n"
            "def build(): return Net()\n"
            "def __getattr__(name): raise AssertionError('module __getattr__ ran')\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "imported"
    for name in [name for name in sys.modules if name.startswith("fresh_pkg")]:
        del sys.modules[name]


# --- register


def test_register_is_a_decorator_in_each_form_and_returns_the_factory():
    @register
    class A(nn.Module):
        pass

    @register(name="b")
    class B(nn.Module):
        pass

    @register()
    def c():
        return A()

    assert isinstance(A, type)
    assert isinstance(B, type)
    assert register(Net, "net") is Net
    assert register(Net, name="other") is Net
    assert resolve(reference_of(A, None).name) is A
    assert resolve("b") is B
    assert resolve(f"{HERE}:{c.__qualname__}") is c
    assert resolve("net") is resolve("other") is Net
    assert sparkdeep.register is register


def test_registering_again_replaces():
    register(Net, "net")
    register(NeedsArgs, "net")
    assert resolve("net") is NeedsArgs


@pytest.mark.parametrize("factory", [7, "a:b", Net()])
def test_what_builds_nothing_cannot_be_registered(factory):
    with pytest.raises(ConfigError, match=r"cannot be registered: it must be an nn.Module subclass or a function"):
        register(factory)


@pytest.mark.parametrize("factory", [lambda: Net(), functools.partial(Net)])
def test_what_has_no_name_needs_one(factory):
    with pytest.raises(ConfigError, match=r"has no name of its own to be stored under: register\(factory, name="):
        register(factory)
    register(factory, "named")
    assert resolve("named") is factory
    assert reference_of(factory, None).name == (
        "named" if not isinstance(factory, functools.partial) else f"{HERE}:Net"
    )


# --- reference_of


@pytest.mark.parametrize(
    ("model", "args", "expected"),
    [
        (Net, None, ModelReference(name=f"{HERE}:Net")),
        (Net, {"hidden": 8, "act": "tanh"}, ModelReference(name=f"{HERE}:Net", kwargs={"hidden": 8, "act": "tanh"})),
        (build, {"hidden": None}, ModelReference(name=f"{HERE}:build", kwargs={"hidden": None})),
        (Holder.Inner, {}, ModelReference(name=f"{HERE}:Holder.Inner")),
        (
            functools.partial(Net, 8, act="a", rate=0.1),
            {"act": "b"},
            ModelReference(name=f"{HERE}:Net", args=(8,), kwargs={"act": "b", "rate": 0.1}),
        ),
        (
            functools.partial(functools.partial(Net, 8), rate=True),
            None,
            ModelReference(name=f"{HERE}:Net", args=(8,), kwargs={"rate": True}),
        ),
        ("pkg.module:Net", {"a": 1}, ModelReference(name="pkg.module:Net", kwargs={"a": 1})),
        (Net(), {"ignored": object()}, ModelReference(name=f"{HERE}:Net")),
        (Lazy(), None, ModelReference(name=f"{HERE}:Lazy")),
        (Recurrent(), None, ModelReference(name=f"{HERE}:Recurrent")),
    ],
)
def test_what_a_name_and_scalars_can_say_has_a_reference(model, args, expected):
    reference = reference_of(model, args)
    assert reference == expected
    assert ModelReference.from_json(reference.to_json()) == expected


class Color(enum.StrEnum):
    RED = "red"


def local_class():
    class Local(nn.Module):
        pass

    return Local


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (Net, {"hidden": np.int64(4)}),
        (Net, {"hidden": np.float64(4)}),
        (Net, {"act": Color.RED}),
        (Net, {"act": nn.ReLU()}),
        (Net, {"hidden": [4]}),
        (functools.partial(Net, [4]), None),
        (functools.partial(Net, act=torch.relu), None),
        (lambda: Net(), None),
        (local_class(), None),
        (local_class()(), None),
        (Net().forward, None),
        (NeedsArgs(4), None),
        (nn.Sequential(nn.Linear(3, 1)), None),
    ],
)
def test_what_they_cannot_say_has_none(model, args):
    assert reference_of(model, args) is None


def changed(module, change):
    change(module)
    return module


@pytest.mark.parametrize(
    "instance",
    [
        Net(8),
        Net(act="tanh"),
        Net(rate=0.1),
        Recurrent(layers=2),
        Net().double(),
        changed(Net(), lambda net: setattr(net, "extra", nn.Linear(1, 1))),
        changed(Net(), lambda net: setattr(net, "drop", nn.Identity())),
        changed(Net(), lambda net: setattr(net, "later", 3)),
        changed(Net(), lambda net: net.register_forward_hook(lambda *_: None)),
    ],
    ids=["shape", "attribute", "submodule attribute", "layers", "dtype", "part", "kind", "set later", "hook"],
)
def test_an_instance_that_its_class_would_build_differently_has_no_reference(instance):
    assert reference_of(instance, None) is None


def test_an_instance_keeps_its_reference_through_training_and_the_random_stream_is_left_alone():
    net = Net().eval()
    with torch.no_grad():
        net.first.weight.add_(1)
    net.first.weight.requires_grad_(False)
    before = torch.random.get_rng_state()
    assert reference_of(net, None) == ModelReference(name=f"{HERE}:Net")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_registered_name_is_what_is_stored():
    register(build, "my build")
    assert reference_of(build, {"hidden": 2}) == ModelReference(name="my build", kwargs={"hidden": 2})


@pytest.mark.parametrize(
    "value",
    [
        None,
        "a:b",
        [],
        {"name": "a:b"},
        {"name": 1, "args": [], "kwargs": {}},
        {"name": "a:b", "args": {}, "kwargs": {}},
        {"name": "a:b", "args": [[]], "kwargs": {}},
        {"name": "a:b", "args": [], "kwargs": {"a": {}}},
    ],
)
def test_a_stored_reference_is_a_name_with_scalars(value):
    with pytest.raises(ModelLoadError, match="is not a name with strings, numbers, booleans and nulls"):
        ModelReference.from_json(value)


# --- resolve


def test_an_imported_module_class_resolves():
    assert resolve(f"{HERE}:Net") is Net
    assert resolve(f"{HERE}:Holder.Inner") is Holder.Inner
    assert resolve("torch.nn:Linear") is nn.Linear


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:call",
        "subprocess:Popen",
        "os:system",
        "posix:system",
        "builtins:eval",
        "builtins:exec",
        "builtins:__import__",
        "builtins:type",
        "importlib:import_module",
        "pickle:loads",
        "torch:load",
        "torch.hub:load",
        "sparkdeep.models.registry:import_factory",
        f"{HERE}:build",
        f"{HERE}:local_class",
        f"{HERE}:not_a_factory",
        f"{HERE}:Holder",
        f"{HERE}:Holder.trap",
        f"{HERE}:Holder.descriptor",
        f"{HERE}:Holder.static",
        f"{HERE}:Holder.__init__",
        f"{HERE}:Net.forward",
        f"{HERE}:Net.__init__",
        f"{HERE}:torch.nn.Linear",
        f"{HERE}:nn.Linear",
        f"{HERE}:sys.exit",
        f"{HERE}:nothing",
        f"{HERE}:Net.nothing",
    ],
)
@pytest.mark.parametrize("listed", [[], ["somewhere.else"]])
def test_nothing_but_module_classes_resolves_however_imported(name, listed):
    with pytest.raises(ModelLoadError) as raised:
        resolve(name, allow_modules=listed)
    message = str(raised.value)
    assert f"{name!r} is refused" in message
    assert "Loading runs no code that a file chose" in message
    for remedy in ("sparkdeep.register(Net)", "model=Net", "allow_modules=['package']"):
        assert remedy in message


@pytest.mark.parametrize(
    "name", ["", ":", "os", "os.system", "a:b:c", "a:", ":b", "a b:c", "a:b()", "../a:b", "a:b\n", "1:2"]
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(ModelLoadError, match="is no registered name, and not of the form"):
        resolve(name)


def test_a_module_that_is_not_imported_stays_so_unless_listed(fresh_modules):
    with pytest.raises(ModelLoadError, match=r"fresh_pkg\.sub\.nets is neither imported here nor listed"):
        resolve("fresh_pkg.sub.nets:Net")
    for near_miss in (["fresh_pkg_other"], ["fresh"], ["fresh_pkg.su"], ["fresh_pkg.sub.nets.deeper"], [""]):
        with pytest.raises(ModelLoadError, match="neither imported"):
            resolve("fresh_pkg.sub.nets:Net", allow_modules=near_miss)
    assert not fresh_modules.exists()
    assert not any(name.startswith("fresh_pkg") for name in sys.modules)


@pytest.mark.parametrize("listed", ["fresh_pkg", "fresh_pkg.sub", "fresh_pkg.sub.nets"])
def test_a_listed_module_or_a_package_above_it_is_imported(fresh_modules, listed):
    factory = resolve("fresh_pkg.sub.nets:Net", allow_modules=["x", listed])
    assert factory.__name__ == "Net"
    assert fresh_modules.exists()
    assert resolve("fresh_pkg.sub.nets:build", allow_modules=[listed]).__name__ == "build"
    with pytest.raises(ModelLoadError, match="the function build"):
        resolve("fresh_pkg.sub.nets:build")


@pytest.mark.parametrize("name", ["check_output", "system", "subprocess.run", "missing"])
def test_what_a_listed_module_has_imported_from_elsewhere_is_refused(fresh_modules, name):
    with pytest.raises(ModelLoadError, match="is refused"):
        resolve(f"fresh_pkg.sub.nets:{name}", allow_modules=["fresh_pkg"])


def test_a_listed_module_that_cannot_be_imported_is_named():
    with pytest.raises(ModelLoadError, match="no_such_module cannot be imported"):
        resolve("no_such_module:Net", allow_modules=["no_such_module"])


def test_a_blocked_module_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocked", None)
    with pytest.raises(ModelLoadError, match="neither imported"):
        resolve("blocked:Net")


def test_a_registered_factory_resolves_under_its_import_name_too():
    register(build, "my build")
    assert resolve(f"{HERE}:build") is build


def test_a_notebook_class_resolves_while_it_is_defined(monkeypatch):
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    with pytest.raises(ModelLoadError, match="__main__ has no class or function 'Cell'"):
        resolve("__main__:Cell")
    notebook.Cell = type("Cell", (nn.Module,), {"__module__": "__main__"})
    assert resolve("__main__:Cell") is notebook.Cell


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as pip would install it, whose network runs what a text says; imported by the session already."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "downloader.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, repository=None, size=2):\n"
        "        super().__init__()\n"
        "        if repository: exec(open(repository).read())\n"
        "class Own(Net):\n"
        "    def __init__(self, activation='relu'):\n"
        "        super().__init__()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("downloader")
    del sys.modules["downloader"]


def test_a_file_gives_no_text_to_a_constructor_of_an_installed_package(installed, monkeypatch):
    inherited = type("Inherited", (installed.Net,), {"__module__": HERE, "__qualname__": "Inherited"})
    monkeypatch.setattr(sys.modules[HERE], "Inherited", inherited, raising=False)
    for name, arguments in [
        ("downloader:Net", ["evil.py"]),
        ("downloader:Net", [["a", ("evil.py",)]]),
        ("downloader:Net", [{"path": "evil.py"}]),
        (f"{HERE}:Inherited", ["evil.py"]),  # its constructor is still theirs
    ]:
        with pytest.raises(ModelLoadError, match=r"the file gives it texts.*register\(Net\)"):
            resolve(name, arguments=arguments)
        assert resolve(name, arguments=[4, 0.5, True, None])
    assert resolve("downloader:Net", arguments=["x"], allow_modules=["downloader"]) is installed.Net
    assert resolve(f"{HERE}:Net", arguments=["relu"]) is Net
    assert resolve("torch.nn:Conv2d", arguments=["zeros"]) is nn.Conv2d
    register(installed.Net)
    assert resolve("downloader:Net", arguments=["x"]) is installed.Net


def test_allow_modules_must_be_a_list():
    with pytest.raises(ConfigError, match=r"give a list, \['os'\]"):
        resolve("os:system", allow_modules="os")


# --- what the user wrote


def test_a_users_own_spec_is_imported(fresh_modules):
    assert import_factory("torch.nn:MSELoss") is nn.MSELoss
    assert import_factory("fresh_pkg.sub.nets:build")().__class__.__name__ == "Net"
    assert import_factory(f"{HERE}:Holder.static") is Holder.static


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torch.nn.MSELoss", r"'torch.nn.MSELoss' is not of the form 'package.module:name'; write for instance"),
        ("", "is not of the form"),
        (
            "no_such_module:x",
            r"module 'no_such_module' cannot be imported .*; install it, or put its folder on PYTHONPATH",
        ),
        ("torch.nn:MSELos", r"the module torch\.nn has no 'MSELos'; did you mean 'MSELoss'\?"),
        ("torch.nn:zzzzzz", r"has no 'zzzzzz'; name one that it defines"),
        ("torch:pi", r"'torch:pi' is an object of class float, which cannot be called; name a class or a function"),
    ],
)
def test_a_spec_that_leads_nowhere_says_why(spec, message):
    with pytest.raises(ConfigError, match=message):
        import_factory(spec)
