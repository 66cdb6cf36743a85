"""What is there to be copied away works without the project: each method, the three modules, the README's update."""

import ast
import copy
import json
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from cases import TinyNet, assert_state, joint_sgd
from conftest import ROOT

import attacks
from train_dynat import dynat_step

METHODS = {file.stem: file.read_text() for file in sorted((ROOT / "variants").glob("[!_]*.py"))}
COPIES = METHODS | {name: (ROOT / f"{name}.py").read_text() for name in ("models", "attacks", "losses")}
FOREIGN = """
import importlib, json, sys
import torch
from torch import nn

def update(method, epoch):
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    networks = {"target": net(), "guide": net()} if "guide" in method["training"] else {"target": net()}
    loop = {"epoch": epoch, "noise": lambda k: torch.zeros(()), "all_reduce": None}
    loop = {name: loop[name] for name in method.get("needs", ())}
    arguments = {"epsilon": 0.031, "step_size": 0.007, "steps": 2, **method["step_settings"], **loop}
    optimizer = torch.optim.SGD([weight for network in networks.values() for weight in network.parameters()], 0.1)
    x, y, before = torch.rand(8, 3, 4, 4), torch.arange(8), networks["target"][-1].weight.clone()
    method["step"](**networks, optimizer=optimizer, x=x, y=y, start=x, **arguments)
    assert not torch.equal(networks["target"][-1].weight, before)

errors, root, names = {}, sys.argv[1], sys.argv[2:]
for name in names:
    for other in names:
        sys.modules.pop(other, None)
    sys.path.insert(0, f"{root}/{name}")
    try:
        for method in getattr(importlib.import_module(name), "METHODS", {}).values():
            update(method, epoch=1)
            update(method, epoch=1000)  # with weights and perturbations
    except Exception as error:
        errors[name] = repr(error)
    sys.path.pop(0)
print(json.dumps(errors))
"""


def imported(source):
    """The modules outside of the standard library that a source imports, wherever in it; a relative one as ''."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What went wrong with a copy by its name: a module alone, a method beside attacks.py and losses.py."""
    root = tmp_path_factory.mktemp("copies")
    for name in COPIES:
        (root / name).mkdir()
        for file in {name, "attacks", "losses"} if name in METHODS else {name}:
            (root / name / f"{file}.py").write_text(COPIES[file])
    done = subprocess.run([sys.executable, "-I", "-c", FOREIGN, root, *COPIES], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COPIES)
def test_each_copy_works_in_a_folder_without_the_project(errors, name):
    assert name not in errors, errors[name]
    assert (ROOT / "variants" / "__init__.py").read_text() == ""
    assert imported(COPIES[name]) <= ({"torch", "attacks", "losses"} if name in METHODS else {"torch"})


def test_the_readmes_update_is_dynats_step_in_at_most_20_lines():
    section = re.split(r"^## .*your own code\n", (ROOT / "README.md").read_text(), flags=re.M | re.I)[1]
    block = re.search(r"```python\n(.*?)```", section.split("\n## ")[0], re.S)[1]
    assert imported(block) <= {"torch", "models", "attacks", "losses"} and len(block.splitlines()) <= 20
    torch.manual_seed(0)
    target, guide = TinyNet(), TinyNet()
    networks, hp = copy.deepcopy([target, guide]), {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}
    loader = [(torch.rand(16, 3, 8, 8), torch.randint(0, 10, (16,))) for _ in range(2)]
    namespace = {"target": target, "guide": guide, "optimizer": joint_sgd(hp, target, guide), "loader": loader}
    with mock.patch.object(attacks, "linf_pgd", side_effect=attacks.linf_pgd) as linf_pgd:
        exec(block, namespace)
    optimizer = joint_sgd(hp, *networks)
    for (x, y), ((_, _, start, _), settings) in zip(loader, linf_pgd.call_args_list, strict=True):
        x_adv, _ = dynat_step(*networks, optimizer, x, y, start, inner=True, beta=1.0, **settings)
    assert torch.equal(namespace["x_adv"], x_adv) and (x_adv - x).abs().max() <= settings["epsilon"] + 1e-6
    for network, expected in zip((target, guide), networks, strict=True):
        assert_state(network, expected.state_dict(), 0, "the network")
