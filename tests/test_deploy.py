"""Containers and dashboards, as far as they can be checked without running one: they parse, what they name is there,
and every query asks for what is exposed."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from keypast.keys import find_key, read_keys
from service.settings import read_settings
from tests.metric_docs import documented

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
GPU = ROOT / "docker-compose.gpu.yml"
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# ---- queries ---------------------------------------------------------------------------------------------------------

SCRAPED = {"instance", "job"}  # labels that Prometheus adds
FUNCTIONS = {"histogram_quantile", "sum", "rate", "increase", "by", "without", "ignoring", "on", "group_left", "avg"}
SELECTOR = re.compile(r"([a-z_]\w*)\s*(?:\{([^}]*)\})?(?:\[[^]]*\])?")
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left)\s*\(([^)]*)\)")


def queries() -> Iterator[tuple[str, str]]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
    for group in load(PROMETHEUS / "rules.yml")["groups"]:
        for rule in group["rules"]:
            yield f"rules.yml: {rule['alert']}", rule["expr"]


def faults(query: str) -> list[str]:
    """What a query asks for that is not there."""
    known, found = series(), []
    labels = set(SCRAPED)
    plain = GROUPING.sub(" ", query)
    for name, matchers in SELECTOR.findall(plain):
        if name in FUNCTIONS or (name == "up" or name.startswith("process_")):
            continue
        if name not in known:
            found.append(name)
            continue
        labels |= known[name]
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        found += [f"{name}{{{label}}}" for label in asked - known[name] - SCRAPED]
    for group in GROUPING.findall(query):
        found += [f"by {label}" for label in re.findall(r"\w+", group) if label not in labels]
    return found


def series() -> dict[str, set[str]]:
    """Names as queries say them, and their labels."""
    known: dict[str, set[str]] = {}
    for name, metric in documented().items():
        labels = set(metric.labels)
        if metric.kind == "histogram":
            known |= {f"{name}_bucket": {*labels, "le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            known[name] = labels
    return known


@pytest.mark.parametrize("query", [pytest.param(query, id=where) for where, query in queries()])
def test_a_query_asks_for_what_is_exposed(query: str) -> None:
    assert faults(query) == []


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("sum(rate(keypast_nothing_total[5m]))", "keypast_nothing_total"),
        ('keypast_blocks{estate="used"}', "keypast_blocks{estate}"),
        ("sum by (tenant) (keypast_sessions)", "by tenant"),
        ("rate(keypast_batch_seconds[5m])", "keypast_batch_seconds"),
    ],
)
def test_a_query_for_what_is_not_is_seen(query: str, fault: str) -> None:
    assert faults(query) == [fault]


def test_every_metric_of_our_own_is_documented_once() -> None:
    assert len(documented()) > 20
    assert all(name.startswith(("keypast_", "gen_ai_server_", "http_server_")) for name in documented())


# ---- Prometheus and Grafana ------------------------------------------------------------------------------------------


def test_prometheus_scrapes_the_service_with_its_key() -> None:
    config, compose = load(PROMETHEUS / "prometheus.yml"), load(COMPOSE)
    for name in config["rule_files"]:
        assert (PROMETHEUS / name).is_file()
    (job,) = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in compose["services"]
    assert f"KEYPAST_PORT={port}" in (ROOT / "Dockerfile").read_text()
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in compose["services"]["prometheus"]["secrets"]
    for _, query in queries():
        for job_name in re.findall(r'job="(\w+)"', query):
            assert job_name == job["job_name"]


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    compose = load(COMPOSE)
    mounts = dict(volume.split(":")[:2][::-1] for volume in compose["services"]["grafana"]["volumes"])
    provider = load(GRAFANA / "provisioning" / "dashboards" / "keypast.yml")["providers"][0]
    assert ROOT / mounts[provider["options"]["path"]] == GRAFANA / "dashboards"
    assert ROOT / mounts["/etc/grafana/provisioning"] == GRAFANA / "provisioning"
    (source,) = load(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose["services"]
    assert DASHBOARDS
    for path in DASHBOARDS:
        panels = json.loads(path.read_text())["panels"]
        assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {source["uid"]}
        assert len({panel["id"] for panel in panels}) == len(panels)


# ---- compose ---------------------------------------------------------------------------------------------------------


def test_what_compose_names_is_there() -> None:
    compose = load(COMPOSE)
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        assert set(service.get("depends_on", [])) <= set(compose["services"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        for name, value in service.get("environment", {}).items():
            if "/run/secrets/" in str(value):
                assert Path(value).name in service["secrets"], name
    used = {secret for service in compose["services"].values() for secret in service.get("secrets", [])}
    assert used == set(compose["secrets"])


def test_every_service_is_bounded_and_may_do_little() -> None:
    for name, service in load(COMPOSE)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service.get("build") or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_the_service_gets_settings_that_there_are_and_time_to_drain() -> None:
    service = load(COMPOSE)["services"]["keypast"]
    given = image_environment() | service["environment"] | load(GPU)["services"]["keypast"]["environment"]
    ours = {name: value for name, value in given.items() if name.startswith("KEYPAST_")}
    settings = read_settings(ours)
    assert all(name.removeprefix("KEYPAST_").lower() in type(settings).model_fields for name in ours)
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > settings.drain_seconds + 2 * settings.cancel_seconds + 5
    assert settings.guarded


def test_the_gpu_file_goes_over_the_other() -> None:
    base, over = load(COMPOSE)["services"], load(GPU)["services"]
    assert set(over) <= set(base)
    arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert set(over["keypast"]["build"]["args"]) <= arguments
    assert over["keypast"]["image"] != base["keypast"]["image"]


def test_secrets_are_made_once_and_stay_out_of_git(tmp_path: Path) -> None:
    command = tmp_path / "keypast"
    command.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m keypast.cli "$@"\n')
    command.chmod(0o755)
    script = tmp_path / "deploy" / "make-secrets"
    script.parent.mkdir()
    script.write_text((ROOT / "deploy" / "make-secrets").read_text())
    script.chmod(0o755)
    made = subprocess.run([script, command], capture_output=True, text=True, check=True)
    folder = script.parent / "secrets"
    wanted = {ROOT / secret["file"] for secret in load(COMPOSE)["secrets"].values()}
    assert {ROOT / "deploy" / "secrets" / path.name for path in folder.iterdir()} == wanted
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o700
    keys = read_keys(folder / "keys")
    given = (made.stdout, (folder / "metrics_key").read_text(), (folder / "loadtest_key").read_text())
    opened = [find_key(keys, key.strip(), 0.0) for key in given]
    told = [(record.tenant, record.role) for record in opened if record]
    assert told == [("me", "user"), ("prometheus", "metrics"), ("loadtest", "user")]
    assert len((folder / "grafana_password").read_text().strip()) == 32
    assert subprocess.run([script, command], capture_output=True, check=False).returncode == 1
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


# ---- the image -------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and what it is given, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(place for place, (name, _) in enumerate(found) if name == "FROM") :]


def image_environment() -> dict[str, str]:
    text = " ".join(given for name, given in final_stage() if name == "ENV")
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', text)}


def test_the_dockerfile_copies_what_is_there_and_is_sent() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [given.split()[:-1] for name, given in instructions() if name == "COPY" and "--from" not in given]
    names = {name for group in copied for name in group}
    assert {name.split("/")[0] for name in names} == sent
    assert all((ROOT / name).exists() for name in names)
    packages = re.findall(r'include = \["(\w+)\*", "(\w+)\*", "(\w+)\*"\]', (ROOT / "pyproject.toml").read_text())
    assert set(packages[0]) <= names


def test_what_the_build_runs_can_be_parsed() -> None:
    scripts = [given for name, given in instructions() if name == "RUN"]
    for script in scripts:
        parsed = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (parsed.returncode, parsed.stderr) == (0, ""), script
    programs = [program for script in scripts for program in re.findall(r'python -c "([^"]*)"', script)]
    assert len(programs) == 2
    for program in programs:
        ast.parse(program)


def test_the_image_has_what_the_package_says_it_needs() -> None:
    (program,) = [
        program
        for name, given in instructions()
        for program in re.findall(r'python -c "([^"]*tomllib[^"]*)"', given)
        if name == "RUN"
    ]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {re.split(r"[^\w-]", line)[0] for line in done.stdout.splitlines()}
    assert {"httpx", "numpy", "torch", "fastapi", "prometheus-client"} <= names
    assert "pytest" not in names


def test_the_image_runs_as_nobody_special_and_is_watched() -> None:
    last = dict(final_stage())
    assert last["USER"] == "10001:10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert (last["ENTRYPOINT"], last["CMD"]) == ('["keypast"]', '["serve"]')
    assert last["HEALTHCHECK"].endswith('CMD ["python", "-m", "service.healthcheck"]')
    assert (ROOT / "service" / "healthcheck.py").is_file()


def test_no_compiler_stays_but_where_triton_needs_one() -> None:
    for name, given in final_stage():
        if name == "RUN" and re.search(r"\b(gcc|g\+\+|clang|build-essential|make)\b", given):
            assert given.startswith('if [ "$DEVICE" = cuda ]; then')
    assert any("g++" in given for name, given in instructions() if name == "RUN"), "the builder has one"


def test_the_image_is_built_of_what_was_tested() -> None:
    torch = dict(given.split("=", 1) for name, given in instructions() if name == "ARG")["TORCH"]
    assert torch in (ROOT / "constraints.txt").read_text().splitlines()
    assert f"{torch}\n" in (ROOT / "Makefile").read_text()
    bases = {given.split()[0] for name, given in instructions() if name == "FROM"}
    assert len(bases) == 1, "kernels and packages were built for the Python that runs them"


def test_the_image_serves_what_the_service_serves_by_default() -> None:
    settings = read_settings({k: v for k, v in image_environment().items() if k.startswith("KEYPAST_")})
    plain = read_settings({})
    assert set(settings.models) == set(plain.models)
    assert settings.models["attention"] == plain.models["attention"]
    models = [given for name, given in instructions() if name == "RUN" and "gguf" in given]
    assert settings.models["smollm2-135m"] in models[0]
