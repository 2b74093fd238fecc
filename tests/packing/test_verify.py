"""A good archive passes; each fault is found and named, and nothing of the archive is run."""

from __future__ import annotations

import io
import json
import os
import pydoc
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import BUNDLES, ROOT

from common.__main__ import main
from common.errors import BadInput
from common.packing import CHECKSUMS, Limits, verify_archive
from common.packing.archive import archive_bytes, checksum_list
from common.packing.configs import carried, merge_configs
from common.packing.inspection import ATTRIBUTES, MODULES, config_uses, import_names, logging_uses
from common.packing.verify import verify_config

Change = Callable[[dict[str, bytes]], None]
Mutate = Callable[..., Path]
TOP = "dual_decoder"


@pytest.fixture(scope="module")
def files(packed: dict[str, Path]) -> dict[str, bytes]:
    """Content of a good archive, by path in the bundle."""
    with zipfile.ZipFile(packed[TOP]) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def mutate(files: dict[str, bytes], tmp_path: Path) -> Mutate:
    """A copy of the archive with a change, by default with checksums that know of it."""

    def call(change: Change, reseal: bool = True) -> Path:
        changed = dict(files)
        change(changed)
        if reseal:
            changed.pop(CHECKSUMS, None)
            changed[CHECKSUMS] = checksum_list(changed)
        path = tmp_path / "changed.zip"
        path.write_bytes(archive_bytes(TOP, changed))
        return path

    return call


def edit(name: str, **values: Any) -> Change:
    """Set values, by MONAI's ids, in a JSON file of the archive."""

    def change(files: dict[str, bytes]) -> None:
        content = json.loads(files[name])
        for key, value in values.items():
            node = content
            *path, last = key.split("#")
            for part in path:
                node = node[part]
            node[last] = value
        files[name] = json.dumps(content).encode()

    return change


def problems(path: Path, **arguments: Any) -> str:
    report = verify_archive(path, **arguments)
    assert report.fine == (not report.problems)
    return "\n".join(": ".join(found) for found in report.problems)


def test_what_was_packed_is_fine(packed: dict[str, Path]) -> None:
    for bundle, path in packed.items():
        report = verify_archive(path)
        assert report.fine, report.problems
        assert (report.bundle, report.version, report.notes) == (bundle, "1.0.0", [])
        assert set(report.done) == {"archive", "files", "digests", "weights", "metadata", "code", "configs"}
        objects = report.objects()
        assert "configs/inference.json" in objects["scripts.common.inferers.SlidingWindow"]
        assert "configs/inference.json" in objects["monai.data.dataloader.DataLoader"]
        assert objects["torch.cuda.is_available"] == ["configs/inference.json", "configs/train.json"]
        assert objects["builtins.len"]


def test_no_archive(tmp_path: Path, packed: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"none\.zip: no such file"):
        verify_archive(tmp_path / "none.zip")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(packed[TOP].read_bytes()[:-1000])
    assert "can't be read as a zip file" in problems(cut)


def test_damage_is_found_by_the_zip_file_itself(packed: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(packed[TOP].read_bytes())
    content[content.index(b"Apache License")] ^= 1
    path = tmp_path / "damaged.zip"
    path.write_bytes(content)
    assert "LICENSE: can't be unpacked" in problems(path)


def _set(name: str, content: bytes) -> Change:
    return lambda files: files.update({name: content})


DIGESTS = {
    "changed": (_set("docs/README.md", b"other"), r"docs/README.md: was changed"),
    "missing": (lambda files: files.pop("scripts/common/errors.py"), "errors.py: is listed in checksums.sha256, but"),
    "extra": (_set("scripts/common/more.py", b""), "scripts/common/more.py: is not listed"),
    "no list": (lambda files: files.pop(CHECKSUMS), "checksums.sha256: is missing"),
    "no checksum": (lambda files: files.update({CHECKSUMS: files[CHECKSUMS] + b"abc  a\n"}), "'abc  a' is no checksum"),
    "no list at all": (_set(CHECKSUMS, b"a\n" * 100_000), "the line 'a' is no checksum"),
    "listed twice": (lambda files: files.update({CHECKSUMS: 2 * files[CHECKSUMS]}), "listed twice"),
}


@pytest.mark.parametrize(("change", "message"), DIGESTS.values(), ids=DIGESTS)
def test_checksums(change: Change, message: str, mutate: Mutate) -> None:
    found = problems(mutate(change, reseal=False))
    assert message in found
    assert found.count("\n") < 10


def _link(entry: zipfile.ZipInfo) -> None:
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def _device(entry: zipfile.ZipInfo) -> None:
    entry.external_attr = (stat.S_IFCHR | 0o644) << 16


ENTRIES = {
    "absolute": ("/etc/cron.d/x", None, "/etc/cron.d/x: is an absolute path"),
    "parent": (f"{TOP}/../../x", None, "leads out of the folder"),
    "drive": ("C:/x", None, "colon in its name"),
    "backslash": (f"{TOP}\\..\\x", None, "backslash"),
    "not plain": (f"{TOP}/./x", None, "is not a plain path"),
    "control character": (f"{TOP}/\x1b[2Jx", None, "can't be shown"),
    "link": (f"{TOP}/docs/link", _link, "docs/link: is a link"),
    "device": (f"{TOP}/docs/device", _device, "is neither a file nor a folder"),
    "twice": (f"{TOP}/LICENSE", None, f"{TOP}/LICENSE: is there twice"),
    "twice but for case": (f"{TOP}/license", None, f"is one file with {TOP}/LICENSE on Windows"),
    "file and folder": (f"{TOP}/docs", None, f"{TOP}/docs: is both a file and a folder"),
    "no name": ("", None, "archive.zip: is not a plain path"),
    "second folder": ("other/x", None, "expected one folder at the top"),
    "no folder": ("x", None, "expected one folder at the top"),
}


@pytest.mark.parametrize(("name", "change", "message"), ENTRIES.values(), ids=ENTRIES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_paths_in_the_archive(
    name: str, change: Callable[[zipfile.ZipInfo], None] | None, message: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "archive.zip"
    path.write_bytes(packed[TOP].read_bytes())
    entry = zipfile.ZipInfo(name)
    if change:
        change(entry)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, "x")
    assert message in problems(path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["archive.zip"]


def test_bombs(packed: dict[str, Path], tmp_path: Path, mutate: Mutate) -> None:
    assert "unpacks to 0.00 GB, more than 1e-05 GB" in problems(packed[TOP], limits=Limits(size=1e4))
    assert "files, more than 5" in problems(packed[TOP], limits=Limits(files=5))
    path = tmp_path / "bomb.zip"
    path.write_bytes(packed[TOP].read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{TOP}/docs/zeros.md", bytes(5_000_000))
    assert "zeros.md: unpacks to" in problems(path)
    assert "zeros.md: is not listed" in problems(path, limits=Limits(ratio=2000))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(5_000_000))
    assert "models/model.pt: archive/data/0 unpacks to" in problems(mutate(_set("models/model.pt", buffer.getvalue())))
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1).expand(10_000, 100_000, 100)}}, buffer)
    assert "a tensor of 100000000000 numbers" in problems(mutate(_set("models/model.pt", buffer.getvalue())))
    buffer = io.BytesIO()
    torch.save({"model": dict.fromkeys("abcdefghij", torch.zeros(1_000_000))}, buffer)
    sized = mutate(_set("models/model.pt", buffer.getvalue()))
    assert "the tensors take 0.04 GB, more than 0.03 GB" in problems(sized, limits=Limits(size=3e7, ratio=1e4))


class Marker:
    """What unpickling this does is to leave a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_weights(mutate: Mutate, files: dict[str, bytes], tmp_path: Path) -> None:
    def saved(content: Any) -> Change:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return _set("models/model.pt", buffer.getvalue())

    assert "models/model.pt: can't be read as weights" in problems(mutate(saved({"model": Marker(tmp_path / "ran")})))
    assert not (tmp_path / "ran").exists()
    state = torch.load(io.BytesIO(files["models/model.pt"]), weights_only=True)["model"]
    name = next(iter(state))
    wrong = problems(mutate(saved({"model": {**state, name: state[name] * torch.nan}})))
    assert f"NaN or infinite number in {name!r}" in wrong
    wrong = problems(mutate(saved({"model": {**state, name: state[name] + 1}})))
    assert "models/model.json: is about other weights" in wrong
    assert "configs/metadata.json: is about other weights" in wrong


FORMAT = "network_data_format"
METADATA = {
    "schema": ({"authors": 3}, r"configs/metadata.json, $.authors: 3 is not of type 'string'"),
    "no version": ({"version": None}, "$.version: None is not of type"),
    "other output": ({f"{FORMAT}#outputs": {"out": {}, "pred": "a"}}, "is not valid under any"),
    "first output": ({f"{FORMAT}#outputs": {"out": 1, "pred": "a"}}, "the first must be 'pred'"),
    "channels": ({f"{FORMAT}#outputs#pred#num_channels": 9}, "num_channels and channel_def disagree"),
    "labels": (
        {f"{FORMAT}#outputs#pred#channel_def": {"0": "wall", "1": "a", "2": "b", "3": "c"}},
        "names the channels",
    ),
    "lineage": ({"lineage": ["a"]}, "is about other weights (None)"),
}


@pytest.mark.parametrize(("values", "message"), METADATA.values(), ids=METADATA)
def test_metadata(values: Mapping[str, Any], message: str, mutate: Mutate) -> None:
    assert message in problems(mutate(edit("configs/metadata.json", **values)))


def test_files_that_a_bundle_does_not_have(mutate: Mutate) -> None:
    for name in ("numpy.py", "models/model.ts", "models/a.pt", "scripts/common/x.so", "configs/inference.yaml"):
        assert f"files: {name}: is nothing that a packed bundle has" in problems(mutate(_set(name, b"")))
    assert "files: LICENSE: is missing" in problems(mutate(lambda files: files.pop("LICENSE")))


INFERENCE = "configs/inference.json"
CONFIGS = {
    "target": ({"inferer#_target_": "os.system"}, "inferer#_target_: os.system runs other things than bundles need"),
    "built-in": ({"inferer#_target_": "exec"}, "builtins.exec runs other"),
    "in a list": ({"handlers": [{"_target_": "subprocess.run"}]}, "handlers#0#_target_: subprocess.run runs other"),
    "by another key": ({"inferer#_target_": "@input", "input": "os.system"}, "@input is named by another part"),
    "by an expression": ({"inferer#_target_": "$'os.sys' + 'tem'"}, "is a name that an expression makes"),
    "macro": ({"inferer": "%/tmp/other.json#inferer"}, "takes its value from another file"),
    "a macro of the bundle": ({"inferer": "%configs/train.json#inferer"}, "takes its value from another file"),
    "import": ({"imports": ["$import os"]}, "imports#0: os runs other"),
    "import of a module": ({"imports": ["$import torch.utils.collect_env"]}, "torch.utils.collect_env runs other"),
    "alias": ({"imports": ["$from os import system as monai"]}, "os.system runs other"),
    "expression": ({"amp": "$__import__('os').system('ls')"}, "builtins.__import__ runs other"),
    "getattr": ({"amp": "$getattr(torch, 'h' + 'ub')"}, "builtins.getattr runs other"),
    "through torch": ({"amp": "$torch.hub.load('a', 'b')"}, "torch.hub.load runs other"),
    "through a package": ({"amp": "$common.study.subprocess.run(['ls'])"}, "scripts.common.study.subprocess.run runs"),
    "through a list": ({"amp": "$[torch][0].hub.load('a')"}, "(...).hub.load runs other things"),
    "through a key": ({"a": "$torch", "amp": "$@a.hub.load('a')"}, "(...).hub.load runs other things"),
    "a package as a value": ({"amp": "$torch"}, "amp: torch runs other"),
    "a target's part": ({"inferer#_target_": {"_target_": "torch.nn.ReLU"}}, "is a part of a name that the config"),
    "debugging": ({"inferer#_mode_": "debug"}, "inferer#_mode_: debug is a way to call it"),
    "MONAI's references": ({"amp": "$__local_refs['a']"}, "in a way that can't be followed"),
    # MONAI puts the id of the place where it stands, which may be any text, into the quotes.
    "relative": ({"amp": "$'%#a'"}, "in a way that can't be followed"),
    # MONAI's substitution makes this `'__local_refs['f'] {eval('1')}'`, the end of which is an f-string.
    "out of quotes": ({"f": 0, "amp": "$'@f {eval(1)}'"}, "builtins.eval runs other"),
    "private": ({"amp": "$().__class__.__base__.__subclasses__()"}, "by '__class__'"),
    "hidden name": ({"amp": "$[eval for eval in [1]] and eval('1')"}, "eval is a name of its own for something else"),
    "no Python": ({"amp": "$a b"}, "a b can't be read as Python"),
}


@pytest.mark.parametrize(("values", "message"), CONFIGS.values(), ids=CONFIGS)
def test_what_configs_would_run(values: Mapping[str, Any], message: str, mutate: Mutate) -> None:
    wrong = problems(mutate(edit(INFERENCE, **values)))
    assert message in wrong
    assert "configs: configs/inference.json, " in wrong


WAYS_OUT = {
    "monai.utils.run_cmd": "$monai.utils.run_cmd(['touch', 'x'])",
    "monai.bundle.run": "$monai.bundle.run(config_file='x')",
    "monai.transforms.utils.eval": "$monai.transforms.utils.eval('1')",
    "torch.utils.collect_env.run": "$torch.utils.collect_env.run('touch x')",
    "torch.save": "$torch.save({}, 'x')",
    "torch.utils.model_zoo.load_url": "$torch.utils.model_zoo.load_url('http://a.org/x')",
    "torch.package.PackageImporter": "$torch.package.PackageImporter('x')",
    "torch.distributed.run.main": "$torch.distributed.run.main(['x.py'])",
    "numpy.testing.runstring": "$np.testing.runstring('1', {})",
    "numpy.testing.measure": "$numpy.testing.measure('1')",
    "numpy.savetxt": "$np.savetxt('x', [1])",
    "builtins.run_cmd": "$run_cmd(['touch', 'x'])",
    "builtins.str.join": "$str.join('', ['a'])",
    "(...).tofile": "$@features.tofile('x')",
    "(...).write_text": "$common.handlers.overview.Path('x').write_text('y')",
}
TARGETS = {
    "run_cmd": "monai.utils.misc.run_cmd",
    "monai.utils.run_cmd": "monai.utils.run_cmd",
    # These look up what a string names, and call it.
    "LoadImaged": "monai.transforms.io.dictionary.LoadImaged",
    "monai.transforms.SaveImaged": "monai.transforms.SaveImaged",
    "monai.inferers.PatchInferer": "monai.inferers.PatchInferer",
    "monai.transforms.spatial.dictionary.optional_import": "monai.transforms.spatial.dictionary.optional_import",
    "monai.losses.PerceptualLoss": "monai.losses.PerceptualLoss",
    "torch.utils.collect_env.run": "torch.utils.collect_env.run",
    "torch.package.PackageImporter": "torch.package.PackageImporter",
    "scripts.common.networks.save_weights": "scripts.common.networks.save_weights",
    "scripts.common.handlers.overview.Path": "scripts.common.handlers.overview.Path",
    "scripts.common.handlers.none.None": "scripts.common.handlers.none.None",
}


def test_ways_out_of_the_usual_packages() -> None:
    for name, expression in WAYS_OUT.items():
        faults = [use.fault for use in config_uses("a.json", {"run": [expression]}, {"common": "scripts.common"})]
        named = [use.name for use in config_uses("a.json", {"run": [expression]}, {}) if use.fault]
        assert any(faults), expression
        assert name in named or name.startswith("(..."), expression
    for target, name in TARGETS.items():
        (use,) = config_uses("a.json", {"a": {"_target_": target}}, {})
        assert (use.name, use.fault) == (name, "runs other things than bundles need"), target


def test_what_people_lay_over_is_fine() -> None:
    fine = ("RandGaussianNoised", "monai.transforms.RandZoomd", "monai.losses.DiceFocalLoss", "torch.nn.LeakyReLU")
    for target in (*fine, "torch.optim.AdamW", "monai.data.DataLoader", "scripts.common.networks.vnet.VNet"):
        (use,) = config_uses("a.json", {"a": {"_target_": target}}, {})
        assert not use.fault, use
    assert not [use for use in config_uses("a.json", {"a": "$@train#method.trainable_parameters()"}, {}) if use.fault]


def test_no_attribute_that_is_allowed_is_something_of_a_module() -> None:
    """A module that a config imports is a value, too."""
    assert len(MODULES) > 20
    for name in MODULES:
        own = name.removeprefix("scripts.")
        found = pydoc.locate(own)
        assert found is not None, name
        assert not [attribute for attribute in ATTRIBUTES if hasattr(found, attribute)], name


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_config_of_the_bundles_is_fine(bundle: str) -> None:
    """Recipes, ablations, baselines and protocols, too."""
    configs = carried(merge_configs(ROOT / "bundles" / bundle / "configs", []))
    names = {alias: full for config in configs.values() for alias, full in import_names(config).items()}
    uses = [use for name, config in configs.items() for use in config_uses(name, config, names)]
    assert len(uses) > 90
    assert not [use for use in uses if use.fault]


def test_metadata_are_values(mutate: Mutate, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    told = f"$__import__('pathlib').Path({str(mark)!r}).touch()"
    wrong = problems(mutate(edit("configs/metadata.json", intended_use=told)))
    assert "metadata: configs/metadata.json, intended_use: " in wrong
    assert "would be run or looked up" in wrong
    for value in ("%/etc/x.json#a", "@network_def", ["$1"], {"a": {"b": "$1"}}):
        assert "would be run or looked up" in problems(mutate(edit("configs/metadata.json", more=value)))
    for value in ({"_target_": 3}, [{"_target_": "os.system"}], {"a#_target_": "os.system"}):
        assert "would be called" in problems(mutate(edit("configs/metadata.json", more=value)))
    assert not problems(mutate(edit("configs/metadata.json", more={"cost": "5 $ @ 3 %"})))
    assert not mark.exists()


def test_more_of_configs(mutate: Mutate) -> None:
    handler = b"[handlers]\nkeys=a\n[handler_a]\nclass=StreamHandler\nargs=(__import__('os').system('ls'),)\n"
    assert "configs/logging.conf, handler_a#args: (__import__" in problems(
        mutate(_set("configs/logging.conf", handler))
    )
    handler = b"[handlers]\nkeys=a\n[handler_a]\nclass=handlers.SMTPHandler\nargs=()\n"
    found = problems(mutate(_set("configs/logging.conf", handler)))
    assert "handler_a#class: handlers.SMTPHandler" in found
    assert "--allow" not in found
    twice = b'{"a": {"_target_": "os.system", "_target_": "monai.data.Dataset"}}'
    assert "configs/more.json: is not the JSON" in problems(mutate(_set("configs/more.json", twice)))
    deep = b"[" * 100_000
    assert "configs/more.json: is not the JSON" in problems(mutate(_set("configs/more.json", deep)))


def _logging(section: str, *lines: str) -> str:
    """A logging configuration that Python takes, with more lines in a section of its own or of the file's."""
    own = (ROOT / "bundles" / "student" / "configs" / "logging.conf").read_text()
    header, more = f"[{section}]\n", "".join(f"{line}\n" for line in lines)
    return own.replace(header, header + more) if header in own else f"{header}{more}\n{own}"


def test_own_logging_is_fine(packed: dict[str, Path]) -> None:
    for path in sorted((ROOT / "bundles").glob("*/configs/logging.conf")):
        uses = list(logging_uses("logging.conf", path.read_text()))
        assert {(use.key, use.name, use.fault) for use in uses} == {
            ("handler_console#class", "StreamHandler", None),
            ("handler_console#args", "(sys.stdout,)", None),
        }
    assert not [
        use for use in logging_uses("a.conf", _logging("handler_x", "class=NullHandler", "args=()")) if use.fault
    ]


@pytest.mark.parametrize(
    ("section", "lines"),
    [
        ("DEFAULT", ["evil=',), __import__('os').system('touch RAN'), ('"]),
        ("DEFAULT", ["args=(__import__('os').system('touch RAN'),)"]),
        ("DEFAULT", ["defaults=__import__('os').system('touch RAN')"]),
        ("formatter_plain", ["defaults=__import__('os').system('touch RAN')"]),
        ("formatter_plain", ["class=antigravity.Formatter"]),
        ("formatter_plain", ["style={"]),
        ("handler_console", ["evil=',), __import__('os').system('touch RAN'), ('"]),
        ("handler_x", ["class=StreamHandler", "args=('%(name)s',)"]),
        ("handler_x", ["class=StreamHandler", "kwargs={'stream': open('RAN', 'w')}"]),
        ("handler_x", ["class=FileHandler", "args=('RAN', 'w')"]),
        ("logger_x", ["level=%(level)s", "handlers=", "qualname=x"]),
        ("more", ["args=()"]),
    ],
)
def test_logging_that_does_more_is_refused(section: str, lines: list[str]) -> None:
    assert [use for use in logging_uses("a.conf", _logging(section, *lines)) if use.fault]


@pytest.mark.parametrize("attack", ["interpolated", "defaults"])
def test_programs_in_logging_are_found(attack: str, mutate: Mutate, tmp_path: Path) -> None:
    ran = tmp_path / "RAN"
    code = f"__import__('pathlib').Path('{ran}').touch()"
    text = _logging("formatter_plain", f"defaults={{'a': {code}}}")
    if attack == "interpolated":
        text = _logging("DEFAULT", f"evil=',), {code}, ('").replace("(sys.stdout,)", "('%(evil)s',)")
    config = tmp_path / "logging.conf"
    config.write_text(text)
    if attack == "interpolated" or sys.version_info >= (3, 12):  # older ones know no `defaults`
        subprocess.run(
            [sys.executable, "-c", f"import logging.config; logging.config.fileConfig({str(config)!r})"],
            capture_output=True,
            check=False,
        )
        assert ran.exists(), "Python no longer runs it"
    found = problems(mutate(_set("configs/logging.conf", text.encode())))
    assert "configs/logging.conf, " in found
    assert "is more than a log on the screen needs" in found


def test_more_can_be_allowed(mutate: Mutate) -> None:
    path = mutate(edit(INFERENCE, **{"inferer#_target_": "my_package.inferers.Own", "amp": "$torch.hub.load('a')"}))
    assert "my_package.inferers.Own" in problems(path)
    assert not problems(path, allow=["my_package", "torch.hub.load"])
    assert "my_package.inferers.Own" in problems(path, allow=["my_pack", "torch.hub.load"])
    assert not problems(mutate(edit(INFERENCE, amp="$@features.copy()")), allow=["(...).copy"])


@pytest.mark.parametrize(
    ("signature", "offset", "value"),
    [(b"PK\x01\x02", 8, b"\x20"), (b"PK\x01\x02", 8, b"\x40"), (b"PK\x03\x04", 30, b"\xff\xff")],
    ids=["patched", "strongly encrypted", "a name that is no text"],
)
def test_entries_that_can_not_be_read(
    signature: bytes, offset: int, value: bytes, packed: dict[str, Path], tmp_path: Path
) -> None:
    content = bytearray(packed[TOP].read_bytes())
    # The last entry of the directory, or the first file: weights in between are archives, too.
    place = content.rindex(signature) if signature == b"PK\x01\x02" else content.index(signature)
    if offset == 30:
        content[place + 6 : place + 8] = b"\x00\x08"  # names are in UTF-8
    content[place + offset : place + offset + len(value)] = value
    path = tmp_path / "flags.zip"
    path.write_bytes(content)
    (found,) = verify_archive(path).problems
    assert found[0] == "archive"
    assert "can't be unpacked" in found[2]


def test_code_that_is_not_the_installed_has_to_be_allowed(mutate: Mutate, files: dict[str, bytes]) -> None:
    name = "scripts/common/errors.py"
    path = mutate(_set(name, files[name] + b"# more\n"))
    ((check, _, problem),) = verify_archive(path).problems
    assert check == "code"
    assert "--allow scripts" in problem
    report = verify_archive(path, allow=["scripts"])
    assert report.fine
    assert len(report.notes) == 1
    assert f"1 of {sum(file.startswith('scripts/') for file in files)} files" in report.notes[0]
    assert name in report.notes[0]


def test_code_is_run_only_when_asked_for(
    mutate: Mutate, files: dict[str, bytes], tmp_path: Path, packed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, mark = "scripts/common/__init__.py", tmp_path / "ran"

    def change(files: dict[str, bytes]) -> None:
        files[name] += f"\nPath({str(mark)!r}).touch()\n".encode()
        edit(INFERENCE, attention_stages=[])(files)

    path = mutate(change)
    assert verify_archive(path, allow=["scripts"]).fine
    assert not mark.exists()
    report = verify_archive(path, run_code=True)
    assert mark.exists()
    assert [place for _, place, _ in report.problems] == [INFERENCE]
    assert "don't fit its network" in report.problems[0][2]

    assert main(["verify", str(packed[TOP]), "--run-code", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fine"] is True
    assert "takes the weights" in found["done"]["network"]


def test_from_the_command_line(mutate: Mutate, capsys: pytest.CaptureFixture[str], packed: dict[str, Path]) -> None:
    assert main(["verify", str(packed[TOP])]) == 0
    printed = capsys.readouterr().out
    assert "dual_decoder 1.0.0" in printed
    assert "scripts.common.networks.DualDecoderNetwork  (inference.json" in printed
    assert printed.endswith("fine\n")
    path = mutate(edit(INFERENCE, **{"inferer#_target_": "os.system"}))
    assert main(["verify", str(path)]) == 1
    assert "WRONG configs, configs/inference.json, inferer#_target_: os.system" in capsys.readouterr().out
    assert main(["verify", str(path), "--allow", "os.system"]) == 0
    capsys.readouterr()
    assert main(["verify", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fine"] is False
    assert found["problems"][0]["place"] == "configs/inference.json, inferer#_target_"
    assert main(["verify", str(path), "--max-size", "0.0001"]) == 1
    assert "more than 0.0001 GB" in capsys.readouterr().out


OWN_CONFIGS = sorted(path for path in ROOT.glob("bundles/*/configs/**/*.json") if path.name != "metadata.json")


@pytest.mark.parametrize("path", OWN_CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_config_by_itself(path: Path) -> None:
    report = verify_config(path)
    assert report.fine, report.problems


def test_a_plan_of_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"spacing": "$__import__('os').system('touch here')", "x": {"_target_": "os.system"}}))
    assert main(["verify", str(plan)]) == 1
    said = capsys.readouterr().out
    assert "plan.json, x#_target_: " in said
    assert "plan.json, spacing: " in said
    plan.write_text(json.dumps({"spacing": [1, 1, 1], "x": {"_target_": "my_package.Loss"}}))
    assert main(["verify", str(plan), "--allow", "my_package"]) == 0
    assert "network" not in capsys.readouterr().out, "a config alone has none"
    plan.write_text("{")
    assert main(["verify", str(plan)]) == 1
    plan.write_text(json.dumps({"imports": ["$import torch.nn as common"]}))
    capsys.readouterr()
    assert main(["verify", str(plan)]) == 1
    assert "common: stands for" in capsys.readouterr().out, "what the configs below call `common` would be another's"
