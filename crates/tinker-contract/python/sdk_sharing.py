"""Shares and manages through the official Python SDK: what lies beside training and sampling.

    python sdk_sharing.py BASE_URL BASE_MODEL FOLDER    # the key in TINKER_API_KEY

The server hands out short-lived tokens and has samples waited for with one poll. Prints one line for
each step that held, and an empty JSON object at the end.
"""

import datetime
import json
import os
import pathlib
import sys
import urllib.request

import tinker
from common import cli, leave, step
from tinker import types

BASE_URL, BASE_MODEL, FOLDER = sys.argv[1:4]


def sampling(service):
    sampler = service.create_sampling_client(base_model=BASE_MODEL).result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    params = types.SamplingParams(max_tokens=6, stop=[])
    futures = [sampler.sample(prompt, 1, params) for _ in range(40)]
    drawn = {tuple(future.result().sequences[0].tokens) for future in futures}
    assert len(drawn) == 40, len(drawn)
    step("forty samples that one poll waits for")

    # No text of a prompt is the user's own: the request is refused, and the poll goes on.
    try:
        sampler.sample(types.ModelInput.from_ints([10**6]), 1, params).result()
        raise AssertionError("a token out of range was sampled from")
    except tinker.RequestFailedError as error:
        assert "1000000" in str(error), error
    step("a failed sample is told by the same poll")

    other = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle())
    theirs = tuple(other.sample(prompt, 1, params).result().sequences[0].tokens)
    assert theirs not in drawn, "its numbers are those of the first client"
    step("a sampler shared by its handle")


def sharing(service, client):
    rest = service.create_rest_client()
    saved = client.save_state("a").result().path
    copied = rest.copy_weights(saved, "archive", ttl_seconds=7200).result()
    assert copied != saved and copied.endswith("/weights/a"), copied
    runs = rest.list_training_runs(project_id="archive").result().training_runs
    assert [run.training_run_id for run in runs] == [copied.split("/")[2]], runs
    service.create_training_client_from_state_with_optimizer(copied).result()
    step("a copy in another project, which can be trained from")

    rest.publish_checkpoint_from_tinker_path(saved).result()
    rest.set_checkpoint_ttl_from_tinker_path(saved, 3600).result()
    row = [c for c in rest.list_checkpoints(client.model_id).result().checkpoints if c.tinker_path == saved][0]
    assert row.public and row.expires_at, row
    rest.unpublish_checkpoint_from_tinker_path(saved).result()
    rest.set_checkpoint_ttl_from_tinker_path(saved, None).result()
    row = [c for c in rest.list_checkpoints(client.model_id).result().checkpoints if c.tinker_path == saved][0]
    assert not row.public and row.expires_at is None, row
    step("published and taken back, with and without an end")

    external = client.save_weights_external("out").result().path
    urls = rest.get_external_weights_urls(external).result().urls
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}, urls
    with urllib.request.urlopen(urls["adapter_config.json"]) as answer:
        assert json.load(answer)["peft_type"] == "LORA"
    step("external weights by their links")

    folder = pathlib.Path(cli("checkpoint", "download", saved, "-o", FOLDER, folder=FOLDER)["destination"])
    assert (folder / "adapter_model.safetensors").stat().st_size > 1000, list(folder.iterdir())
    step("the command line downloads a training checkpoint")


def managing(service, client):
    rest = service.create_rest_client()
    session = client.model_id.split(":")[0]
    rest.assign_session_project(session, "p").result()
    found = rest.search_sessions(types.SessionSearchRequest(project_ids=["p"])).result()
    assert [row.session_id for row in found.sessions] == [session], found
    assert found.sessions[0].status.type == "active", found
    step("a session moved to a project is found there")

    who = rest.whoami().result()
    assert cli("auth", "whoami", folder=FOLDER)["email"] == who.email == "local@localhost", who
    trace = cli("session", "export-trace", session, "-o", f"{FOLDER}/t.pftrace", folder=FOLDER)
    events = json.loads(pathlib.Path(trace["destination"]).read_text())["traceEvents"]
    assert {"create_model", "save_weights"} <= {event["name"] for event in events}, events
    step("who one is, and the timeline of a session")


def watching(client):
    admin = tinker.AdminClient(base_url=BASE_URL)
    now = datetime.datetime.now(datetime.timezone.utc)
    # The day, or the hour, may have ended since the first call.
    days = [(now - datetime.timedelta(days=1)).date(), now.date()]

    def events(kind):
        logs = [admin.get_audit_log(kind, day).result() for day in days]
        return {(e.event, e.event_details.get("tinker_path")) for log in logs for e in log.entries}

    assert ("checkpoint_created", f"tinker://{client.model_id}/weights/a") in events("checkpoints")
    assert {event for event, _ in events("projects")} == {"project_session_assigned"}, events("projects")
    step("the audit log")

    hour = now.replace(minute=0, second=0, microsecond=0)
    window = (hour - datetime.timedelta(hours=1), hour + datetime.timedelta(hours=1))
    usage = admin.get_billing_usage(*window).result()
    drawn = [event for event in usage.data if event.event_info.type == "sampling_sample"]
    assert sum(event.event_info.token_count for event in drawn) == 41 * 6, drawn
    session = client.model_id.split(":")[0]
    assert {event.session_id for event in drawn} == {session} and session in usage.sessions, usage
    stored = admin.get_current_checkpoint_storage_usage("archive").result().data
    assert [row.checkpoint_count for row in stored] == [1] and stored[0].size_bytes > 1000, stored
    step("what was used and what is stored")


def main():
    os.environ["TINKER_BASE_URL"] = BASE_URL
    with tinker.ServiceClient(base_url=BASE_URL) as service:
        client = service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=7).result()
        sampling(service)
        sharing(service, client)
        managing(service, client)
        watching(client)
    leave({})


main()
