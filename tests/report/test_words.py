"""Numbers and their meanings, for people."""

import math

from hf_dskd.report.words import MEANINGS, PROBES, duration, meaning_of, number


def test_numbers_for_people():
    shown = {None: "–", 12345: "12,345", 1.0: "1", 0.123456: "0.1235", -0.5: "−0.5", 1e-5: "1e−05"}
    assert {value: number(value) for value in shown} == shown
    assert [number(value) for value in (True, 12345.6, math.nan, math.inf)] == ["yes", "12,346", "nan", "inf"]
    assert duration(59.6) == "1:00 min" and duration(3661) == "1:01:01 h"


def test_what_numbers_mean():
    chunk = MEANINGS["t2s_accuracy"]
    assert meaning_of("t2s_accuracy") == chunk and meaning_of("s2t_accuracy") != chunk
    assert meaning_of("probe_clp_t2s_accuracy") == f"{chunk} ({PROBES['probe_clp_']})"
    assert meaning_of("s2t_entropy") == f"{MEANINGS['entropy']} ({PROBES['s2t_']})"
    assert meaning_of("unheard_of") == meaning_of("probe_clp_unheard_of") == ""
