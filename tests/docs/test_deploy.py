"""The files in `deploy/`: they parse, they fit together, and they say what the server understands.

Nothing here builds the image or runs it: that needs Docker.
"""

import json
import re
from pathlib import Path

import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def understood(arguments):
    """Whether `vllm serve` takes these arguments, the first of which is the model."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", *arguments]).sampler == "boe"


def test_every_yaml_file_parses():
    files = sorted(DEPLOY.rglob("*.y*ml"))
    assert len(files) == 5
    for file in files:
        assert all(documents(file.relative_to(DEPLOY)))


def test_the_compose_file_mounts_what_exists_and_scrapes_the_server():
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    assert understood(services["server"]["command"])
    assert (DEPLOY / services["server"]["build"]["context"] / "deploy" / "Dockerfile").is_file()
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
    (prometheus,) = documents("prometheus/prometheus.yml")
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]


def test_grafana_finds_the_dashboard_and_its_source():
    (compose,) = documents("compose.yaml")
    (provider,) = documents("grafana/provisioning/dashboards/boe-vllm.yaml")[0]["providers"]
    mounted = [v for v in compose["services"]["grafana"]["volumes"] if "boe-vllm.json" in v]
    source, target = mounted[0].split(":")[:2]
    assert str(Path(target).parent) == provider["options"]["path"]
    dashboard = json.loads((DEPLOY / source).read_text(encoding="utf-8"))
    assert dashboard["uid"] and dashboard["panels"]
    (origin,) = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    assert (origin["type"], origin["url"]) == ("prometheus", "http://prometheus:9090")


def test_kubernetes_asks_the_server_for_its_health():
    deployment, service = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert understood(container["args"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    grace = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert pod["terminationGracePeriodSeconds"] > grace + 10
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels


def test_the_image_takes_what_the_repository_has():
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    base = next(line for line in lines if line.startswith("ARG VLLM_TAG="))
    assert re.fullmatch(r"ARG VLLM_TAG=v\d+\.\d+\.\d+", base)
