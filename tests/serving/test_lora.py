"""Adapters: LoRA of the language model is served by name, one with the fusion modules in full must be merged."""

import pytest

from .conftest import run_there, train

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def connector(tmp_path_factory):
    """An adapter of the paper's recipe, which trains the fusion modules in full."""
    return train(
        tmp_path_factory.mktemp("connector"),
        "training/recipes/finetune_lora.yaml",
        lora_r=16,
        max_length=512,
        learning_rate=5e-3,
        projector_learning_rate=1e-3,
    )


def merged(adapter):
    destination = adapter.parent / "merged"
    run_there("training", "merge", adapter, destination)
    return destination


def differing(answers, others):
    return sum(answer["token_ids"] != other["token_ids"] for answer, other in zip(answers, others, strict=True))


def test_an_adapter_by_name(eager, adapter, conversations, answers, reference, figures):
    """The answers are those of `generate` with the merged model, and the base's are other ones."""
    served = eager.ask_all(conversations, model="shapes")
    merged_model = reference(merged(adapter))
    expected = [merged_model(messages) for messages in conversations]
    figures["LoRA: of 24 answers equal to the merged model's"] = 24 - differing(served, expected)
    figures["LoRA: of 24 answers other than the base's"] = differing(expected, answers)
    assert differing(expected, answers) >= 12  # else equality would mean little
    assert differing(served, expected) == 0


def test_an_adapter_with_fusion_modules_is_refused(eager, connector, conversations, answers):
    """vLLM 0.32 knows no fusion modules in an adapter: it says so, with a status that is not right, and goes on."""
    body = {"lora_name": "connector", "lora_path": str(connector)}
    response = eager.client.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 500  # the engine's: it is the user's to mend
    assert "modules_to_save" in response.text
    assert eager.post({"messages": conversations[0], "model": "connector"}).status_code == 404
    assert eager.ask(conversations[0])["token_ids"] == answers[0]["token_ids"]


def test_it_is_served_when_merged(serve, connector, conversations, answers, reference, figures):
    folder = merged(connector)
    merged_model = reference(folder)
    expected = [merged_model(messages) for messages in conversations]
    assert differing(expected, answers) >= 12
    with serve("merged", folder, "--enforce-eager") as server:
        served = server.ask_all(conversations)
    figures["merged, with fusion modules: of 24 answers equal"] = 24 - differing(served, expected)
    assert differing(served, expected) == 0
