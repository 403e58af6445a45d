import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hiplora.errors import ConfigError, HipLoraError
from hiplora.evaluation.sandbox import __main__ as table
from hiplora.evaluation.sandbox import isolation as room
from hiplora.evaluation.sandbox import missing_guards, require_permission, run_program
from hiplora.evaluation.sandbox.inside import linux


@pytest.fixture
def found_anew():
    room.guards.cache_clear()
    yield
    room.guards.cache_clear()


def refusing(*broken):
    """Stand in for a machine where these layers fail."""
    return lambda layers: (
        f"{bad[0]}: refused" if (bad := [layer for layer in layers if layer in broken]) else ""
    )


def test_all_guards_are_there_when_all_work(found_anew, monkeypatch):
    monkeypatch.setattr(room, "_problem", refusing())
    monkeypatch.setattr(sys, "platform", "linux")
    assert missing_guards() == ()
    assert room.active_layers() == set(room.LAYERS) - ({"account"} if os.geteuid() else set())


def test_a_layer_that_fails_is_missing_with_its_reason_and_the_others_stay(found_anew, monkeypatch):
    monkeypatch.setattr(room, "_problem", refusing("network", "landlock"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert [(guard.layer, guard.reason) for guard in missing_guards()] == [
        ("network", "network: refused"),
        ("landlock", "landlock: refused"),
    ]
    assert {"user", "mount", "pid", "seccomp"} <= room.active_layers()


def test_a_namespace_is_tried_within_a_user_namespace(found_anew, monkeypatch):
    def problem(layers):
        alone = {"mount", "pid", "network", "ipc"} & set(layers) and "user" not in layers
        return "not permitted" if alone or "landlock" in layers else ""

    monkeypatch.setattr(room, "_problem", problem)
    monkeypatch.setattr(sys, "platform", "linux")
    assert [guard.layer for guard in missing_guards()] == ["landlock"]


def test_a_machine_where_nothing_runs_is_an_error(found_anew, monkeypatch):
    monkeypatch.setattr(room, "_problem", lambda layers: "no Python")
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(HipLoraError, match="does not work here: no Python"):
        room.guards()


def test_a_layer_that_the_machine_refuses_is_found_by_trying_it():
    assert room._problem(["a moat"]) == "there is no layer 'a moat'"
    assert room._problem([]) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_what_the_kernel_offers_is_used():
    active = room.active_layers()
    with contextlib.suppress(OSError):
        linux.syscall("landlock_create_ruleset", 444, None, 0, 1)
        assert "landlock" in active
    if "Seccomp_filters" in Path("/proc/self/status").read_text() and os.uname().machine in (
        "x86_64",
        "aarch64",
    ):
        assert "seccomp" in active
    # What util-linux can do here, so can we.
    enter = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--fork"]
    if (
        shutil.which("unshare")
        and not subprocess.run([*enter, "mount", "-t", "tmpfs", "t", "/mnt"]).returncode
    ):
        assert {"user", "mount", "pid", "network", "ipc"} <= active


def test_permission_is_needed_and_the_refusal_says_what_protects_and_what_does_not(found_anew, monkeypatch):
    monkeypatch.setattr(room, "_problem", refusing("network"))
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ConfigError) as refusal:
        require_permission(False)
    said = str(refusal.value)
    assert "--allow-code-execution" in said
    assert "active here: user namespace, mount namespace" in said
    assert "network namespace (network: refused): stops any network" in said
    require_permission(True)


def test_other_systems_name_every_guard_as_missing(found_anew, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert len(missing_guards()) == len(room.guards())
    assert {guard.reason for guard in missing_guards()} == {"needs Linux"}


def test_windows_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(HipLoraError, match="needs Linux"):
        run_program("pass")


def test_the_table_has_a_row_for_each_guard(found_anew, monkeypatch, capsys):
    monkeypatch.setattr(room, "_problem", refusing("network"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert table.main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + len(room.guards())
    [row] = [row for row in rows if "network: refused" in row]
    assert row.split()[:3] == ["network", "namespace", "missing"]


def test_the_module_prints_the_guards_of_this_machine():
    shown = subprocess.run(
        [sys.executable, "-m", "hiplora.evaluation.sandbox"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("guard")
    assert shown.stderr == ""
