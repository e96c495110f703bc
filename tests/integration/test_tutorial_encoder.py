"""What a tutorial on a sentence encoder from Hugging Face tells its readers to type; see `test_tutorials`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.terminal import Terminal

PRINTED = Path(__file__).with_name("tutorials")


@pytest.fixture(scope="module")
def encoder() -> Iterator[Terminal]:
    """The model's folder as printed, archived both ways, and the printed configuration. No server yet."""
    with Terminal() as terminal:
        terminal.make("huggingface_embedding/make_model.py", "bge-large-zh")
        text = (PRINTED / "torchserve.config").read_text(encoding="utf-8")
        text = text.replace("default_workers_per_model=32", "default_workers_per_model=1")
        terminal.write("torchserve.config", text + "disable_token_authorization=true\n")
        (terminal.home / "model-store").mkdir()
        terminal.type(
            "torch-model-archiver -f --model-name bge_large_zh --version 1.0 "
            "--serialized-file bge-large-zh/pytorch_model.bin --handler bge-large-zh/handler.py "
            '--extra-files "bge-large-zh/" '
        )
        terminal.type("mv bge_large_zh.mar model-store/")
        terminal.type(
            "torch-model-archiver -f --model-name=bge_large_zh --version=1.0 "
            "--serialized-file=bge-large-zh/pytorch_model.bin --handler=bge-large-zh/handler.py "
            '--extra-files="bge-large-zh/" --archive-format=no-archive --export-path=no-archive'
        )
        terminal.type("""echo '{"input":"教练, 我想打篮球."}' > note.txt""")
        yield terminal


ENCODE_FILE = "curl -X POST  http://localhost:8080/predictions/bge_large_zh -T note.txt"
ENCODE_TEXT = (
    "curl -X POST --header 'Content-Type: application/json'  http://localhost:8080/predictions/bge_large_zh "
    """--data-raw '{"input":"如何使用torchserve部署模型"}'"""
)
#: Printed with 1000 for 10, and with its first words twice: curl would ask a host named curl as well.
ENCODE_FIVE = (
    "for i in $(seq 10); do curl -X POST --header 'Content-Type: application/json'  "
    "http://localhost:8080/predictions/bge_large_zh "
    """--data-raw '{"input":["教练, 我想打篮球.", "如何使用torchserve部署模型", "怎么训练bert模型", """
    """"怎么使用tensorflow训练bert模型", "怎么使用tfserving部署bert模型"]}'; done"""
)


def vectors(text: str, count: int) -> list[list[float]]:
    """An answer of the encoder, checked for its form."""
    answer: list[list[float]] = json.loads(text)
    assert len(answer) == count
    for vector in answer:
        assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-3)
    return answer


@pytest.mark.slow
def test_encoder_from_an_archive_and_from_a_folder(encoder: Terminal) -> None:
    answers = []
    for models in (
        "--model-store=model-store/ --models bge_large_zh=bge_large_zh.mar",
        "--model-store=no-archive --models bge_large_zh=bge_large_zh",
    ):
        encoder.start_server(f"torchserve --start --ncs {models} --ts-config=torchserve.config")
        encoder.wait_for_workers("bge_large_zh")
        answers.append((vectors(encoder.type(ENCODE_FILE), 1), vectors(encoder.type(ENCODE_TEXT), 1)))
        one_after_another = encoder.type(ENCODE_FIVE).replace("][", "]\n\n[")
        assert [len(vectors(answer, 5)) for answer in one_after_another.split("\n\n")] == [5] * 10
        listed = json.loads(encoder.type('curl "http://localhost:8081/models"'))
        assert listed == {"models": [{"modelName": "bge_large_zh", "modelUrl": models.rpartition("=")[2]}]}
        described = json.loads(encoder.type("curl -X OPTIONS http://localhost:8080"))
        assert described["openapi"] == "3.0.1"
        assert described["info"]["title"] == "TorchServe APIs"
        assert described["paths"]["/predictions/{model_name}"]["post"]["operationId"] == "predictions"
        encoder.type("torchserve --stop")
        encoder.wait_for_end()
    assert answers[0] == answers[1]
