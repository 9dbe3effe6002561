"""What Prometheus is shown: that it is right, well formed, bounded, and not for everybody."""

import asyncio
import re
import threading
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from keypast.keys import new_key
from keypast.schemas import Code
from service.app import create_app
from service.lifecycle import Loaded, Progress
from service.settings import Settings
from tests.metric_docs import documented
from tests.service.conftest import Running, Start
from tests.service.fakes import KINDS, POISON, Fakes, Kind

pytestmark = pytest.mark.anyio

USER, USER_RECORD = new_key("alice")
SCRAPER, SCRAPER_RECORD = new_key("prometheus", "metrics")
ADMIN, ADMIN_RECORD = new_key("ops", "admin")
LINES = ";".join(record.line() for record in (USER_RECORD, SCRAPER_RECORD, ADMIN_RECORD))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Scrape:
    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))

    def __getitem__(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        return {
            frozenset(sample.labels.items()): sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        return sum(value for found, value in self[name].items() if labels.items() <= dict(found).items())


async def scrape(client: httpx.AsyncClient, **headers: str) -> Scrape:
    reply = await client.get("/metrics", headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return Scrape(reply.text)


async def a_life(running: Running, kind: Kind) -> None:
    """Something of everything."""
    client, path = running.client, f"/v1/sessions/{await running.prefilled(kind, 3)}"
    await client.post(f"{path}/step", json=kind.json(1, 3))
    await client.post(f"{path}/score", json=kind.json(2, 4))
    if kind.model == "letters":
        await client.post(f"{path}/generate", json={"max_tokens": 3})
    await client.post(f"{path}/fork", json={"count": 2})
    past = (await client.get(f"{path}/past")).content
    target = await running.session(kind)
    headers = {"content-type": "application/vnd.safetensors"}
    assert (await client.put(f"/v1/sessions/{target}/past", content=past, headers=headers)).status_code == 200
    await client.delete(path)


# ---- well formed: what promtool check metrics looks for --------------------------------------------------------------

NOT_BASE = re.compile(
    r"(nano|micro|milli|centi|kilo|mega|giga|tera|kibi|mebi|gibi)(seconds?|bytes?|grams?|meters?)|minutes?|hours?|days?"
    r"|weeks?|fahrenheit|percent|bits"
)
ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}


def faults(families: Iterable[Metric]) -> list[str]:
    found: list[str] = []
    seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    for family in families:
        exposed = f"{family.name}_total" if family.type == "counter" else family.name
        parts = exposed.split("_")
        wrong = {
            "no help": not family.documentation,
            "no type": family.type == "unknown",
            "type in name": bool({"counter", "gauge", "histogram", "summary", "untyped"} & set(parts)),
            "_total of no counter": family.type != "counter" and family.name.endswith("_total"),
            "a histogram's suffix": family.name.endswith(("_bucket", "_count", "_sum")),
            "not a base unit": any(NOT_BASE.fullmatch(part) for part in parts),
            "abbreviated unit": bool(ABBREVIATED & set(parts)),
            "characters": not re.fullmatch(r"[a-z_][a-z0-9_]*", family.name),
        }
        found += [f"{family.name}: {what}" for what, is_so in wrong.items() if is_so]
        for sample in family.samples:
            series = sample.name, frozenset(sample.labels.items())
            reserved = {"le", "quantile"} & set(sample.labels)
            if series in seen:
                found.append(f"{series}: twice")
            if reserved and not (family.type == "histogram" and sample.name.endswith("_bucket")):
                found.append(f"{series}: has {reserved}")
            if any(not re.fullmatch(r"[a-z_][a-z0-9_]*", label) for label in sample.labels):
                found.append(f"{series}: a label's characters")
            if family.type == "counter" and not sample.name.endswith("_total"):
                found.append(f"{series}: is no _total")
            seen.add(series)
    return found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# TYPE a_b gauge\na_b 1\n", "no help"),
        ("# HELP a_total x\n# TYPE a_total gauge\na_total 1\n", "_total of no counter"),
        ("# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n", "abbreviated unit"),
        ("# HELP a_milliseconds x\n# TYPE a_milliseconds gauge\na_milliseconds 1\n", "not a base unit"),
        ("# HELP a_gauge x\n# TYPE a_gauge gauge\na_gauge 1\n", "type in name"),
        ('# HELP a x\n# TYPE a gauge\na{b="1"} 1\na{b="1"} 1\n', "twice"),
        ('# HELP a x\n# TYPE a gauge\na{aB="1"} 1\n', "characters"),
        ('# HELP a x\n# TYPE a gauge\na{le="1"} 1\n', "le"),
    ],
)
async def test_the_faults_are_seen(text: str, fault: str) -> None:
    assert any(fault in told for told in faults(text_string_to_metric_families(text)))


async def test_all_of_it_is_well_formed(running: Running) -> None:
    for kind in KINDS.values():
        await a_life(running, kind)
    told = await scrape(running.client)
    assert faults(told.families) == []
    for family in told.families:
        if family.type == "histogram":
            check_histogram(told, family.name)


def check_histogram(told: Scrape, name: str) -> None:
    """Counts grow with the bound up to the count of all; no value means a sum of nothing."""
    for labels, count in told[f"{name}_count"].items():
        buckets = sorted(
            (float(dict(found)["le"]), value) for found, value in told[f"{name}_bucket"].items() if labels < found
        )
        counts = [value for _, value in buckets]
        assert counts == sorted(counts), name
        assert (buckets[-1][0], counts[-1]) == (float("inf"), count)
        assert len({bound for bound, _ in buckets}) == len(buckets)
        assert (told[f"{name}_sum"][labels] > 0) <= (count > 0)


async def test_openmetrics_for_who_accepts_it(running: Running) -> None:
    await a_life(running, KINDS["decoder"])
    accept = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"
    reply = await running.client.get("/metrics", headers={"accept": accept})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(reply.text)}  # type: ignore[no-untyped-call]  # the library's
    assert {"keypast_errors", "keypast_batch_seconds", "process_resident_memory_bytes"} <= names
    head = await running.client.head("/metrics", headers={"accept": accept})
    assert (head.status_code, head.headers["content-type"]) == (200, reply.headers["content-type"])


async def test_the_docs_name_all_of_it_and_nothing_else(running: Running) -> None:
    for kind in KINDS.values():
        await a_life(running, kind)
    exposed: dict[str, tuple[str, set[str]]] = {}
    for family in (await scrape(running.client)).families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not name.startswith("process_"):
            exposed[name] = family.type, labels
    assert exposed == {name: (metric.kind, set(metric.labels)) for name, metric in documented().items()}


# ---- right -----------------------------------------------------------------------------------------------------------

REQUESTS = "http_server_request_duration_seconds_count"


async def test_requests_count_by_route_and_status(running: Running, kind: Kind) -> None:
    client, path = running.client, f"/v1/sessions/{await running.prefilled(kind, 3)}"
    for past in (3, 4):
        await client.post(f"{path}/step", json=kind.json(1, past))
    await client.post(f"{path}/step", json={})
    await client.post("/v1/sessions/nobody/step", json=kind.json(1, 3))
    await client.get(path)
    await client.head(path)
    await client.put(path)
    told = await scrape(client)
    found = {tuple(value for _, value in sorted(labels)): count for labels, count in told[REQUESTS].items()}
    one = "/v1/sessions/{session_id}"
    assert found == {
        ("POST", "201", "/v1/sessions"): 1,
        ("POST", "200", f"{one}/prefill"): 1,
        ("POST", "200", f"{one}/step"): 2,
        ("POST", "422", f"{one}/step"): 1,
        ("POST", "404", f"{one}/step"): 1,
        ("GET", "200", one): 1,
        ("HEAD", "200", one): 1,
        ("PUT", "405", one): 1,
    }
    assert told.value("keypast_errors_total", error_type="session_not_found") == 1
    assert told.value("keypast_errors_total", error_type="invalid_input") == 1
    assert told.value("keypast_errors_total", error_type="method_not_allowed") == 1
    assert told.value("keypast_errors_total") == 3
    assert told.value("keypast_active_requests") == 1, "this one"
    assert (await scrape(client)).value(REQUESTS, http_route="/metrics") == 1


async def test_every_code_is_there_from_the_start(running: Running) -> None:
    codes = {dict(labels)["error_type"] for labels in (await scrape(running.client))["keypast_errors_total"]}
    assert codes == {code.value for code in Code}


async def test_what_a_model_did(running: Running) -> None:
    decoder = KINDS["decoder"]
    client, path = running.client, f"/v1/sessions/{await running.prefilled(decoder, 5)}"
    await client.post(f"{path}/step", json=decoder.json(1, 5))
    await client.post(f"{path}/generate", json={"max_tokens": 4})
    await client.post(f"{path}/prefill", json={"token_ids": [[1, 2]], "sample": {}})
    await client.post(f"{path}/fork", json={"count": 2})
    await client.delete(path)
    told = await scrape(client)
    mine = {"model": "letters"}
    positions = {name: told.value("keypast_positions_total", **mine, operation=name) for name in OPERATIONS}
    assert positions == {"prefill": 7, "step": 1, "generate": 4, "score": 0, "export": 0, "import": 0}
    reused = {name: told.value("keypast_reused_positions_total", **mine, operation=name) for name in OPERATIONS}
    assert reused == {"prefill": 10, "step": 5, "generate": 6, "score": 0, "export": 0, "import": 0}
    events = {name: told.value("keypast_session_events_total", **mine, event=name) for name in ("created", "forked")}
    assert events == {"created": 1, "forked": 2}
    assert told.value("keypast_sessions", **mine, state="idle") == 2
    of = {"gen_ai_request_model": "letters", "gen_ai_provider_name": "keypast"}
    first = "gen_ai_server_time_to_first_token_seconds_count"
    assert told.value(first, **of, gen_ai_operation_name="generate") == 1
    assert told.value(first, **of, gen_ai_operation_name="prefill") == 1
    assert told.value("gen_ai_server_time_per_output_token_seconds_count", **of) == 1
    assert told.value("gen_ai_server_request_duration_seconds_count", **of) == 4
    assert told.value("keypast_inter_token_seconds_count", **mine) == 3
    assert told.value("keypast_queue_seconds_count", **mine) == 4
    assert told.value("keypast_batch_rows_sum", **mine) == sum(map(len, running.fakes.decoder.batches))
    assert told.value("keypast_batch_seconds_count", **mine) == len(running.fakes.decoder.batches)
    pool = running.fakes.engine.capacity().models[0]
    assert told.value("keypast_blocks", **mine, state="used") == pool.used > 0
    assert told.value("keypast_blocks", **mine) == pool.total
    assert told.value("keypast_shared_blocks", **mine) == pool.shared > 0
    assert told.value("keypast_reserved_blocks", **mine) == 0
    assert told.value("keypast_block_bytes", **mine) == pool.block_bytes
    assert told.value("keypast_ready") == 1
    assert told.value("keypast_positions_total", model="echo") == 0


OPERATIONS = ("prefill", "step", "generate", "score", "export", "import")


async def test_what_is_wrong_inside_a_good_reply_is_counted(running: Running) -> None:
    """An item of a batch; the end of a generation, told whole or as a stream."""
    client, decoder = running.client, KINDS["decoder"]
    running.fakes.decoder.after = {97: 98, 98: POISON}
    for stream in (False, True):
        path = f"/v1/sessions/{await running.prefilled(decoder, 1)}"
        reply = await client.post(f"{path}/generate", json={"max_tokens": 4, "stream": stream})
        assert (reply.status_code, "model_failed" in reply.text) == (200, True)
    items = [{"session_id": name, "token_ids": [[97]]} for name in ("x", "y", "z")]
    assert (await client.post("/v1/batch/step", json={"items": items})).status_code == 200
    told = await scrape(client)
    assert told.value("keypast_errors_total", error_type="model_failed") == 2
    assert told.value("keypast_errors_total", error_type="session_not_found") == 3


async def test_a_chat_counts_its_prompt_and_what_it_found_of_it(running: Running) -> None:
    running.fakes.decoder.after = {ord("y"): ord("a")}
    prompt = "what is this, say"
    body = {"model": "letters", "prompt": prompt, "max_tokens": 3}
    for _ in range(2):
        assert (await running.client.post("/v1/completions", json=body)).status_code == 200
    told = await scrape(running.client)
    positions = {
        n: told.value("keypast_positions_total", operation=n, model="letters") for n in ("prefill", "generate")
    }
    reused = told.value("keypast_reused_positions_total", operation="generate", model="letters")
    assert positions == {"prefill": 2 * len(prompt) - reused, "generate": 6}
    assert reused == len(prompt) - 1, "the second's prompt, but for the token that it begins with"
    assert told.value(REQUESTS, http_route="/v1/completions", http_response_status_code="200") == 2
    assert told.value("keypast_sessions") == 0


async def test_refused_appends_and_evictions(start: Start) -> None:
    running: Running = await start(blocks=5, evict="lru", max_waiting=1)
    decoder = KINDS["decoder"]
    for name in ("a", "b"):
        await running.prefilled(decoder, 10, id=name)  # 3 blocks of the 4 that there are
    running.fakes.decoder.gate.clear()
    running.fakes.decoder.entered.clear()
    waits = asyncio.ensure_future(running.client.post("/v1/sessions/b/step", json=decoder.json(1, 10)))
    await asyncio.to_thread(running.fakes.decoder.entered.wait, 10)
    assert (await running.client.post("/v1/sessions/b/step", json=decoder.json(1, 11))).status_code == 429
    told = await scrape(running.client)
    assert told.value("keypast_operations", model="letters", state="running") == 1
    assert told.value("keypast_sessions", model="letters", state="running") == 1
    assert told.value("keypast_active_requests") == 2
    running.fakes.decoder.gate.set()
    await waits
    assert told.value("keypast_errors_total", error_type="queue_full") == 1
    assert told.value("keypast_session_events_total", model="letters", event="evicted") == 1


async def test_an_error_that_nobody_foresaw_is_counted(running: Running) -> None:
    @running.app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("/secret/path")

    await running.client.get("/boom")
    told = await scrape(running.client)
    assert told.value("keypast_errors_total", error_type="internal") == 1
    assert told.value(REQUESTS, http_route="/boom", http_response_status_code="500") == 1


async def test_while_loading_and_draining() -> None:
    go_on = threading.Event()
    fakes = Fakes.build()

    def load(progress: Progress) -> Loaded:
        assert go_on.wait(20)
        return fakes.loaded()

    app = create_app(load, Settings(drain_seconds=1.0))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://k")
    async with app.router.lifespan_context(app), client:
        told = await scrape(client)
        assert (told.value("keypast_ready"), told["keypast_blocks"]) == (0, {})
        assert told.value("keypast_build_info") == 1
        go_on.set()
        await app.state.service.loaded()
        assert (await scrape(client)).value("keypast_ready") == 1
        await app.state.service.stop()
        told = await scrape(client)
        assert (told.value("keypast_ready"), told.value("keypast_model_info")) == (0, 2)


# ---- bounded, and not for everybody ----------------------------------------------------------------------------------


async def garbage(running: Running, word: str) -> None:
    client = running.client
    for path in (f"/{word}", f"/v1/sessions/{word}", f"/v1/sessions/{word}/step", f"/v1/sessions/{word}/{word}"):
        for method in ("GET", "POST", word.upper()):
            await client.request(method, path, headers={"x-request-id": word, "idempotency-key": word})
    for path in (f"/v2/models/{word}", f"/v2/models/{word}/versions/{word}/infer", f"/v2/models/letters/{word}"):
        await client.request("POST" if path.endswith("infer") else "GET", path, content=b"{}")
    await client.post("/v1/completions", json={"model": word, "prompt": word, "user": word})
    await client.post("/v1/sessions", json={"model": word, "labels": {word: word}})
    await running.session("letters", id=word, labels={word: word})


async def test_no_label_is_a_clients_to_choose(running: Running) -> None:
    await garbage(running, "zebra")
    first = await scrape(running.client)
    for word in ("yak", "xerus"):
        await garbage(running, word)
    last = await scrape(running.client)
    assert not re.search("zebra|yak|xerus", last.text)
    # a scrape counts from the next one on
    before, after = ({line.split(" ")[0] for line in told.text.splitlines()} for told in (first, last))
    grown = after - before
    assert all('http_route="/metrics"' in series for series in grown), grown
    assert last.value(REQUESTS, http_route="none", http_request_method="_OTHER") > 0


async def test_with_keys_it_is_for_those_who_may(start: Start) -> None:
    running: Running = await start(settings={"keys": LINES})
    client = running.client
    for key, status in ((SCRAPER, 200), (ADMIN, 200), (USER, 403), ("", 401), (SCRAPER[:-1], 401)):
        for method in ("GET", "HEAD"):
            assert (await client.request(method, "/metrics", headers=bearer(key))).status_code == status, key
    told = await scrape(client, **bearer(SCRAPER))
    assert told.value(REQUESTS, http_route="/metrics") == 6
    assert told.value(REQUESTS, http_route="none", http_response_status_code="401") == 4
    assert told.value("keypast_errors_total", error_type="unauthorized") == 4
    assert not re.search("alice|prometheus|ops", told.text)


async def test_a_scrapers_key_opens_nothing_else(start: Start) -> None:
    running: Running = await start(settings={"keys": LINES})
    asked: list[tuple[str, str, Any]] = [
        ("GET", "/v1/sessions", None),
        ("POST", "/v1/sessions", {"model": "letters"}),
        ("GET", "/v1/capacity", None),
        ("GET", "/v1/admin/sessions", None),
        ("POST", "/v1/admin/drain", None),
        ("GET", "/health", None),
        ("GET", "/docs", None),
        ("GET", "/metrics/", None),
        ("GET", "/nothing", None),
    ]
    for method, path, body in asked:
        reply = await running.client.request(method, path, json=body, headers=bearer(SCRAPER))
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden"), path
    assert running.fakes.engine.sessions(None) == []
    assert (await running.client.get("/readyz", headers=bearer(SCRAPER))).status_code == 200
