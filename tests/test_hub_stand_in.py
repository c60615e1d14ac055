"""The stand-in of the hub refuses the cards that the hub refuses; what else it does, the tests of pushes use."""

import pytest
from hub_stand_in import check_card


CARD = """---
license: {license}
base_model: {base_model}
base_model_relation: {relation}
model-index:
- name: small
  results:
  - task: {{type: text-generation}}
    dataset: {{type: dolly, name: Dolly}}
    metrics:
    - {{type: rouge, value: {value}}}
---
Text.
"""
GOOD = {"license": "apache-2.0", "base_model": "ann/tiny", "relation": "finetune", "value": 25.1}


@pytest.mark.parametrize(
    "changed, error",
    [
        ({}, ""),
        ({"license": "my-own"}, '"license" with value'),
        ({"base_model": "runs/a/b"}, '"base_model" with value'),
        ({"base_model": "/tmp/model"}, '"base_model" with value'),
        ({"relation": "distilled"}, '"base_model_relation"'),
        ({"value": "null"}, "metrics[0].value"),
        ({"license": "[mit"}, "YAML Metadata Error"),
    ],
)
def test_cards_are_checked(changed, error):
    errors, warnings = check_card(CARD.format(**{**GOOD, **changed}))
    assert warnings == []
    assert error in "".join(errors) and bool(errors) == bool(error)


def test_model_index_must_be_complete():
    card = CARD.format(**GOOD)
    for part, named in (("name: small", "name"), ("type: text-generation", "task"), ("type: dolly, ", "dataset")):
        errors, _ = check_card(card.replace(part, part.replace(":", "x:")))
        assert len(errors) == 1 and named in errors[0]
    assert check_card("no metadata")[1] == ["empty or missing yaml metadata in repo card"]
