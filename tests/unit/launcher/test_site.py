"""Site files: precedence, refused content, and the draft of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dl2pa.errors import UserError
from launcher import sbatch
from launcher.request import Request, Setup
from launcher.site import load_site, resolve, site_file
from launcher.site_draft import draft_site

SITE = """\
defaults:
  partition: gpu
  account: lab
  gpus_per_node: h100:8
  time: 30
  sbatch: {mail-type: END, mail-user: me@example.org}
  setup: [module load cuda]
  environment: {NCCL_DEBUG: WARN, LEVEL: 2}
  container: /images/a.sif
  container_mounts: [/data]
profiles:
  long: {time: 2-00:00:00, account: null, sbatch: {mail-type: null, exclusive: true}, environment: {LEVEL: 3}}
  typed: {sbatch: {gres: "gpu:a100:4,nvme:1"}}
"""
SETUP = Setup(("module load cuda",), {"NCCL_DEBUG": "WARN", "LEVEL": "2"}, None, ("/data",))


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site file, on a machine without sbatch."""
    file = tmp_path / "cluster.yaml"
    file.write_text(SITE)
    monkeypatch.setenv("DL2PA_CLUSTER", str(file))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sbatch, "_known_options", lambda: set[str]())
    return file


def test_defaults_of_the_site_replace_those_of_dl2pa() -> None:
    assert resolve({}) == Request(
        gpus_per_node=8,
        gpu_type="h100",
        time="30",
        partition="gpu",
        account="lab",
        container="/images/a.sif",
        sbatch=("mail-type=END", "mail-user=me@example.org"),
        setup=SETUP,
    )


def test_a_profile_replaces_defaults_and_the_command_line_both() -> None:
    request = resolve({"profile": "long", "container": "none", "nodes": 2, "sbatch": ["nice=3"]})
    assert (request.time, request.account, request.container) == ("2-00:00:00", None, None)
    assert (request.nodes, request.profile) == (2, "long")
    assert request.sbatch == ("mail-user=me@example.org", "exclusive", "nice=3")
    assert request.setup.environment == {"NCCL_DEBUG": "WARN", "LEVEL": "3"}
    assert resolve({"profile": "long", "time": "5"}).time == "5"


def test_the_number_of_gpus_on_the_command_line_replaces_those_of_gres() -> None:
    typed = resolve({"profile": "typed"})
    assert (typed.gpus_per_node, typed.gpus) == (4, None)
    fewer = resolve({"profile": "typed", "gpus_per_node": "2"})
    assert (fewer.gpus, fewer.sbatch_options["gres"]) == ("2", "nvme:1")
    again = resolve({"profile": "typed", "sbatch": ["gres=gpu:2"]})
    assert (again.gpus_per_node, again.gpus) == (2, None)
    with pytest.raises(UserError, match="requests 2 GPUs per node, and --gpus-per-node 1"):
        resolve({"gpus_per_node": "1", "sbatch": ["gres=gpu:2"]})


def test_a_resumed_run_keeps_its_request_and_takes_the_current_setup(site: Path) -> None:
    last = Request.of(resolve({"profile": "long", "partition": "old"}).as_dict())
    site.write_text(
        SITE.replace("module load cuda", "module load cuda/13").replace("account: lab", "account: new")
    )
    request = resolve({"nodes": 2}, last)
    assert (request.partition, request.account, request.nodes, request.profile) == ("old", None, 2, "long")
    assert request.setup.lines == ("module load cuda/13",)
    assert resolve({"profile": "typed"}, last).gpus_per_node == 4
    site.write_text("")
    with pytest.raises(UserError, match=r"--profile='long': is not a profile.*Use --profile none"):
        resolve({}, last)
    assert resolve({"profile": "none"}, last).partition == "old"


BAD = """\
default: {}
defaults:
  partiton: gpu
  nodes: 0
profiles:
  one:
    time: 2h
    gpus_per_node: 1
    sbatch: {array: 0-3, wrap: id}
  two:
    environment: {API_TOKEN: x, SLURM_CONF: y}
    setup: ["if true"]
  three: 3
  four:
    queue: gpu
    gpus_per_node: "8:h100"
    environment: {API_TOKEN: x, DEBUG: true}
    sbatch: {time: 5, mail-type: [END]}
"""


def test_all_problems_of_a_site_file_are_named_with_their_line(site: Path) -> None:
    site.write_text(BAD)
    with pytest.raises(UserError) as caught:
        resolve({})
    places = {problem.field: problem.place for problem in caught.value.problems}
    assert places == {
        field: f"{site}:{line}"
        for field, line in [
            ("default", 1),
            ("defaults.partiton", 3),
            ("defaults.nodes", 4),
            ("profiles.one.time", 7),
            ("profiles.one.sbatch.array", 9),
            ("profiles.one.sbatch.wrap", 9),
            ("profiles.two.environment.API_TOKEN", 11),
            ("profiles.two.environment.SLURM_CONF", 11),
            ("profiles.two.setup", 12),
            ("profiles.three", 13),
            ("profiles.four.queue", 15),
            ("profiles.four.gpus_per_node", 16),
            ("profiles.four.environment.API_TOKEN", 17),
            ("profiles.four.environment.DEBUG", 17),
            ("profiles.four.sbatch.time", 18),
            ("profiles.four.sbatch.mail-type", 18),
        ]
    }
    assert "Did you mean defaults.partition?" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["defaults: [1]", "profiles: [a]", "defaults: {sbatch: {3: x}}", "a: [", "3"]
)
def test_other_malformed_site_files_are_refused(text: str, site: Path) -> None:
    site.write_text(text)
    with pytest.raises(UserError):
        resolve({})


@pytest.mark.parametrize(
    "variable",
    ["API_TOKEN: abcdef12", "HTTPS_PROXY: 'http://me:hunter22@proxy:3128'", "AUTH: bearer abcdef12"],
)
def test_secrets_in_the_variables_of_a_site_file_are_refused(variable: str, site: Path) -> None:
    site.write_text(f"defaults: {{environment: {{{variable}}}}}")
    with pytest.raises(UserError, match="is a secret, and others can read the script") as caught:
        resolve({})
    assert "hunter22" not in str(caught.value) and "abcdef12" not in str(caught.value)
    site.write_text("defaults: {environment: {HTTPS_PROXY: 'http://proxy:3128', OMP_PROC_BIND: close}}")
    assert resolve({}).setup.environment["HTTPS_PROXY"] == "http://proxy:3128"


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_variable_of_a_site_file_is_not_true_or_false(value: str, site: Path) -> None:
    site.write_text(f"defaults: {{environment: {{NCCL_IB_DISABLE: {value}}}}}")
    message = f'must be text, a number or null. Put it in quotes, as in "{value}", or write 1 or 0'
    with pytest.raises(UserError, match=message):
        resolve({})
    site.write_text(f'defaults: {{environment: {{NCCL_IB_DISABLE: "{value}"}}, sbatch: {{exclusive: true}}}}')
    request = resolve({})
    assert request.setup.environment == {"NCCL_IB_DISABLE": value} and request.sbatch == ("exclusive",)


def test_an_unknown_profile_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"is not a profile of .*cluster.yaml. Did you mean long\?"):
        resolve({"profile": "lnog"})


def test_the_site_file_is_in_the_configuration_folder_unless_named(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert site_file() == site
    monkeypatch.setenv("DL2PA_CLUSTER", "")
    assert site_file() is None and resolve({}) == Request()
    monkeypatch.setenv("DL2PA_CLUSTER", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"DL2PA_CLUSTER=.*no such file"):
        resolve({})
    monkeypatch.delenv("DL2PA_CLUSTER")
    assert site_file() is None
    (tmp_path / "config/dl2pa").mkdir(parents=True)
    site.rename(tmp_path / "config/dl2pa/cluster.yaml")
    assert resolve({}).partition == "gpu"


def fake(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'TEXT'\n{text}\nTEXT\n")
    (tmp_path / name).chmod(0o755)


def test_a_draft_has_one_profile_per_partition_and_is_a_valid_site_file(site: Path, tmp_path: Path) -> None:
    fake(
        tmp_path,
        "sinfo",
        "gpu|up|4|96|1000000|2-00:00:00|gpu:h100:8(S:0-1)\n"
        "gpu|up|2|64|500000|2-00:00:00|gpu:h100:4\n"
        "1.0|up|1|8|1000|infinite|(null)\n"
        "mixed|down|1|8|1000|30:00|gpu:a:1,gpu:b:2",
    )
    fake(tmp_path, "scontrol", "PartitionName=gpu Default=YES\nReservationName=nights State=ACTIVE\n")
    text = draft_site()
    site.write_text(text)
    drafted = load_site(site)
    expected: dict[str, dict[str, Any]] = {
        "gpu": {"partition": "gpu", "gpus_per_node": 8, "gpu_type": "h100", "time": "2-00:00:00"},
        "1.0": {"partition": "1.0", "gpus_per_node": 0, "gpu_type": None, "time": None},
        "mixed": {"partition": "mixed", "gpus_per_node": 3, "gpu_type": None, "time": "30:00"},
    }
    assert drafted.profiles == expected
    assert drafted.defaults == {**expected["gpu"], "cpus_per_gpu": "auto"}
    assert "reservation nights" in text and "2 node(s): 64 CPUs, 500000 MiB, gpu:h100:4" in text


def test_no_draft_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sinfo cannot be called.*Call it on a SLURM host"):
        draft_site()
