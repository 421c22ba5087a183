"""gke_jobset.py: the manifest that it writes, whether Kubernetes and JobSet accept it, and what it refuses."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_scripts import CONFIG, LAUNCH, FakeTools


@pytest.fixture
def tools(tmp_path: Path) -> FakeTools:
    return FakeTools(tmp_path)


def jobset_module() -> Any:
    spec = importlib.util.spec_from_file_location("gke_jobset", LAUNCH / "gke_jobset.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gke_jobset"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


GKE = jobset_module()
BARE = ("--name", "run-1", "--topology", "v5e:4x4", "--image", "europe-docker.pkg.dev/p/r/i:1", "--workdir", "gs://b/r")
IN_IMAGE = ("--config-in-image", "configs/demo.yaml")
EVERYTHING = (
    *(*BARE, "--config", str(CONFIG), "--namespace", "team", "--service-account", "writer", "--mount", "text:/text"),
    *(
        "--mount",
        "more:/more",
        "--max-restarts",
        "3",
        "--grace",
        "120",
        "--run-as",
        "1000",
        "pretrain.steps=5",
        "t=it's: {}",
    ),
)


def manifest(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The documents that `gke_jobset.py ARGUMENTS` would apply."""
    assert GKE.main([*arguments, "--dry-run"]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("topology", "accelerator", "chips", "hosts"),
    [
        ("v4:2x2x1", "tpu-v4-podslice", 4, 1),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 4, 1),
        ("v5p:4x4x4", "tpu-v5p-slice", 4, 16),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", 4, 2),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 4, 64),
        ("v6e:2x2", "tpu-v6e-slice", 4, 1),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
    ],
)
def test_gke_slices(
    capsys: pytest.CaptureFixture[str], topology: str, accelerator: str, chips: int, hosts: int
) -> None:
    [jobset] = manifest(capsys, *BARE, *IN_IMAGE, "--topology", topology)
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}


def test_gke_chips_per_host() -> None:
    assert GKE.slice_of("v5e:2x4", 8) == GKE.Slice("tpu-v5-lite-podslice", "2x4", 8, 1)
    with pytest.raises(GKE.WrongInput, match=r"hosts of v5e:4x4 have 4 chips$"):
        GKE.slice_of("v5e:4x4", 8)


def test_gke_manifest_with_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    config, jobset = manifest(capsys, *EVERYTHING)
    assert config["data"] == {"config.yaml": CONFIG.read_text(encoding="utf-8")}
    assert config["metadata"]["name"] == jobset["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "run-1"
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert config["metadata"]["namespace"] == jobset["metadata"]["namespace"] == "team"
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = template["spec"]
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (120, "writer")
    [container] = pod["containers"]
    assert container["command"] + container["args"] == [
        *("transllm", "run", "/etc/transllm/config.yaml", "pretrain.steps=5", "t=it's: {}"),
        *("--workdir", "gs://b/r", "--distributed", "auto"),
    ]
    assert container["securityContext"]["runAsUser"] == 1000
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    assert volumes["config"]["configMap"] == {"name": config["metadata"]["name"]}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/etc/transllm", "/text", "/more"]


def test_gke_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    [jobset] = manifest(capsys, *BARE, *IN_IMAGE, "--on-demand")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "spot" not in str(pod) and "volumes" not in pod
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_gke_keeps_any_text_of_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = 'a: "\\ \'"\n\ttab ไทย \U0001f600 \x85 \u2028 \ufeff \x7f # {{ x }} {% y %}\n  end: |\n  x  \n\n'
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    config, _ = manifest(capsys, *BARE, "--config", str(path))
    assert config["data"] == {"config.yaml": text}


@pytest.mark.parametrize("arguments", [(*BARE, *IN_IMAGE), (*BARE, *IN_IMAGE, "--on-demand"), EVERYTHING])
@pytest.mark.parametrize("version", ["1.31.0", "1.34.0"])
def test_kubernetes_accepts_the_job(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], version: str
) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    *others, jobset = manifest(capsys, *arguments)
    for other in others:
        validate.validate(other, version, strict=True)
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": job["spec"]}
    validate.validate(whole, version, strict=True)
    # The check finds an unknown field and a value of a wrong type.
    for wrong in ({"backofLimit": 0}, {"parallelism": "many"}):
        with pytest.raises(validate.ValidationError):
            validate.validate(whole | {"spec": whole["spec"] | wrong}, version, strict=True)
    # The API server demands this; the schema does not.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1


@pytest.mark.parametrize("arguments", [(*BARE, *IN_IMAGE), EVERYTHING])
def test_jobset_accepts_the_jobset(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    *_, jobset = manifest(capsys, *arguments)
    read = models.JobsetV1alpha2JobSet.from_dict(jobset)
    # These models drop unknown keys, so the result has to equal the input, in the fields of JobSet itself.
    back = read.to_dict()
    assert (back["apiVersion"], back["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert back["metadata"] == jobset["metadata"]
    assert back["spec"].keys() == jobset["spec"].keys()
    assert back["spec"]["network"] == jobset["spec"]["network"]
    assert back["spec"]["failurePolicy"] == jobset["spec"]["failurePolicy"]
    for mine, theirs in zip(jobset["spec"]["replicatedJobs"], back["spec"]["replicatedJobs"], strict=True):
        assert {key: theirs[key] for key in ("name", "replicas")} == {key: mine[key] for key in ("name", "replicas")}
        assert theirs.keys() == mine.keys() and theirs["template"].keys() == mine["template"].keys()
    described = models.JobsetV1alpha2FailurePolicyRule.model_fields["action"].description
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.search(rf"\b{rule['action']}\b", described)
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    # No field of a later JobSet: an older one would refuse it.
    assert all(
        rule.keys() == {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"}
        for rule in jobset["spec"]["failurePolicy"]["rules"]
    )


def jobset_action(jobset: dict[str, Any], exit_code: int, *, disrupted: bool = False) -> str:
    """The action of JobSet after the first pod to fail, by the documented rules of Kubernetes and JobSet.

    exit_code, disrupted: how this pod ended.
    """
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes")
        if codes is not None and exit_code in codes["values"]:
            assert (codes["operator"], codes["containerName"]) == ("In", "main")
            start = f"Container main for pod default/run-1-hosts-0-0-abcde failed with exit code {exit_code}"
        elif codes is None and disrupted:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            start = "Pod default/run-1-hosts-0-0-abcde has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{start} matching FailJob rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule["onJobFailureReasons"], rule["onJobFailureMessagePatterns"]
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_gke_restarts_by_exit_code(capsys: pytest.CaptureFixture[str], code: int, disrupted: bool, action: str) -> None:
    [jobset] = manifest(capsys, *BARE, *IN_IMAGE)
    assert jobset_action(jobset, code, disrupted=disrupted) == action


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--topology", "v5e:3x3"), "v5e has 1x1, 2x2"),
        (("--topology", "v4:2x2"), "v4 has three numbers"),
        (("--topology", "v5p:1x1x3"), "v5p has three numbers"),
        (("--topology", "v9:2x2"), "write it as v5e:4x4"),
        (("--topology", "4x4"), "write it as v5e:4x4"),
        (("--name", "Run"), "lower-case"),
        (("--name", "r" * 41), "up to 40"),
        (("--workdir", "runs/r"), "gs://bucket/path"),
        (("--mount", "bucket"), "BUCKET:/PATH"),
        (("--max-restarts", "-1"), "0 or more"),
        (("--config", str(CONFIG)), "not allowed with"),
        (("steps",), "nor key=value"),
    ],
)
def test_gke_refuses_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert GKE.main([*BARE, *IN_IMAGE, *arguments, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize("code", [0, 1])
def test_gke_applies_what_the_dry_run_prints(tools: FakeTools, code: int) -> None:
    tools.fake("kubectl", f"cat >applied; exit {code}")
    command = [sys.executable, str(LAUNCH / "gke_jobset.py"), *EVERYTHING]
    printed = subprocess.run([*command, "--dry-run"], env=tools.environment(), capture_output=True, text=True)
    assert printed.returncode == 0 and tools.calls == []
    applied = subprocess.run(command, env=tools.environment(), cwd=tools.root)
    assert applied.returncode == code and tools.calls == [["kubectl", "apply", "-f", "-"]]
    assert (tools.root / "applied").read_text() == printed.stdout
