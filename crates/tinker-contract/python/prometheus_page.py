"""Reads the server's /metrics as Prometheus does, by the parsers of the official client library.

    python prometheus_page.py BASE_URL     # the key in TINKER_API_KEY

Prints a line for each step that held, and the families with their samples as JSON at the end.
"""

import json
import math
import os
import sys
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

BASE_URL = sys.argv[1]
KEY = os.environ["TINKER_API_KEY"]


def page():
    request = urllib.request.Request(f"{BASE_URL}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8", answer.headers
        return answer.read().decode()


def check_histogram(family):
    rows = defaultdict(dict)
    for sample in family.samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        row = rows[tuple(sorted(labels.items()))]
        if sample.name.endswith("_bucket"):
            row.setdefault("buckets", []).append((float(sample.labels["le"]), sample.value))
        else:
            row[sample.name.removeprefix(family.name)] = sample.value
    for labels, row in rows.items():
        bounds, counts = zip(*row["buckets"])
        assert list(bounds) == sorted(set(bounds)) and math.isinf(bounds[-1]), (family.name, labels)
        assert list(counts) == sorted(counts) and counts[-1] == row["_count"], (family.name, labels)
        assert row["_sum"] >= 0, (family.name, labels)


text = page()
families = list(text_string_to_metric_families(text))
print("ok: the page is read", flush=True)

names = [family.name for family in families]
assert len(names) == len(set(names)), names
for family in families:
    assert family.type in ("counter", "gauge", "histogram") and family.documentation.endswith("."), family
    assert family.type != "counter" or all(s.name.endswith("_total") for s in family.samples), family
    series = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
    assert len(series) == len(set(series)), family
    if family.type == "histogram":
        check_histogram(family)
print("ok: every family is described, no series is there twice, histograms add up", flush=True)

n_lines = sum(1 for line in text.splitlines() if line and not line.startswith("#"))
assert n_lines == sum(len(family.samples) for family in families), "a line was taken for something else"
print("ok: every line was read", flush=True)

labels = sorted({value for f in families for s in f.samples for name, value in s.labels.items() if name != "le"})
print(json.dumps({"families": names, "labels": labels}))
