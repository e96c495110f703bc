"""The gRPC inference API of a running server, with a client made from the same .proto files."""

from __future__ import annotations

import json
import queue
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import (
    GrpcClient,
    empty_pb2,
    error_details_pb2,
    failure,
    held,
    inference_pb2,
    open_inference_pb2,
    request,
)
from support.grpc_models import CHUNKS, COUNTER, ECHO, ECHO_STREAM, KSERVE, SEEN, STEPS
from support.server import ServerProcess

INFERENCE = "org.pytorch.serve.grpc.inference.InferenceAPIsService"
NO_WORKER = (
    'Model "{}" has no worker to serve inference request. Please use scale workers API to add workers. If this is a '
    "sequence inference, please check if it is closed, or expired; or exceeds maxSequenceJobQueueSize"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with all the models, bodies up to 80 MB."""
    store = tmp_path_factory.mktemp("store")
    handlers = {"seen": SEEN, "echo": ECHO, "echo_stream": ECHO_STREAM, "chunks": CHUNKS}
    for name, source in handlers.items():
        archive(store, name, source)
    # A batch of fewer than eight waits.
    archive(store, "batched", SEEN, config_yaml="batchPolicy: fixed\nbatchSize: 8\nmaxBatchDelay: 120000")
    archive(store, "late", SEEN, config_yaml="clientTimeoutInMills: 200")
    archive(store, "steps", STEPS, config_yaml="continuousBatching: true\nbatchSize: 4")
    sequences = "sequenceBatching: true\nsequenceMaxIdleMSec: 60000\nmaxNumSequence: 8\nmaxSequenceJobQueueSize: 4"
    archive(store, "counter", COUNTER, config_yaml=f"{sequences}\nbatchSize: 2")
    archive(store, "idle", ECHO)
    size = str(80 << 20)
    config = {
        **{"max_request_size": size, "max_response_size": size, "slots_per_worker": "512"},
        **{"ts_open_inference_protocol": "true", "job_queue_size": "400", "metrics_mode": "prometheus"},
    }
    with ServerProcess(store=store, config=config) as running:
        for name in (*handlers, "batched", "late", "steps", "counter"):
            assert running.register(f"{name}.mar").status == 200
        assert running.register("idle.mar", initial_workers=0).status == 200
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[GrpcClient]:
    with GrpcClient(server) as made:
        yield made


def counted(server: ServerProcess, model: str) -> float:
    """ts_inference_requests_total of a model."""
    text = server.request("metrics", "GET", "/metrics").text
    labels = f'model_name="{model}",model_version="default"'
    found = re.search(rf"(?m)^ts_inference_requests_total{{{labels}.*}} (\S+)$", text)
    return float(found[1]) if found else 0.0


# One request, one answer


def test_ping(client: GrpcClient) -> None:
    assert client.ping() == '{\n  "status": "Healthy"\n}'


def test_inputs_are_keys_of_the_handlers_row(client: GrpcClient) -> None:
    answer = json.loads(client.predict("seen", input={"data": b"one", 'a key: with "quotes"\r\n': "zwölf".encode()}))
    assert answer["row"] == {"data": ["bytearray", "one"], 'a key: with "quotes"\r\n': ["bytearray", "zwölf"]}
    assert answer["headers"]["url_path"] is None
    assert answer["headers"]["explain"] is None
    assert answer["headers"]["data"] == {"content-type": ""}
    assert answer["headers"]["ts_request_sequence_id"] is None


def test_a_named_version_and_an_empty_input(client: GrpcClient) -> None:
    assert json.loads(client.predict("seen", model_version="1.0", input={}))["row"] == {}


def test_a_handler_that_streams_answers_a_unary_call_with_all_of_it(client: GrpcClient) -> None:
    assert client.predict("echo_stream") == b"hellohellohellohellohello world "


def test_a_unary_call_to_a_handler_that_streams_without_end(client: GrpcClient) -> None:
    code, text = failure(lambda: client.predict("chunks", b"2000 100000"))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_response_size" in text
    assert sum(1 for _ in client.stream("chunks", b"10 10", timeout=60)) == 11  # its worker is free again


@pytest.mark.parametrize("size", [0, 1, 2030, 2100, 100_000, 5_000_000])
def test_payloads_of_all_sizes(client: GrpcClient, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert client.predict("echo", data) == data


@pytest.mark.slow
def test_a_payload_of_64_megabytes(client: GrpcClient) -> None:
    data = bytes(range(256)) * (64 << 12)
    assert client.predict("echo", data) == data


def test_a_message_above_max_request_size_is_refused_and_the_next_is_not(client: GrpcClient) -> None:
    code, text = failure(lambda: client.predict("echo", b"x" * (81 << 20)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text
    assert client.predict("echo", b"x") == b"x"


def test_grpc_and_rest_share_batches(server: ServerProcess, client: GrpcClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.predict, "batched", b"x") for _ in range(4)]
        posted = [pool.submit(server.predict, "batched", b"x") for _ in range(4)]
        batches = {json.loads(each.result())["batch"] for each in asked}
        batches |= {json.loads(each.result().body)["batch"] for each in posted}
    assert batches == {8}


def test_many_calls_at_once_take_no_threads(server: ServerProcess, client: GrpcClient) -> None:
    (process,) = server.processes("grpc-server")
    calls = [
        client.inference.Predictions.future(request("seen", input={"sleep": b"0.005"}), timeout=60) for _ in range(200)
    ]
    threads = psutil.Process(process.pid).num_threads()
    assert all(json.loads(call.result().prediction)["batch"] == 1 for call in calls)
    assert threads < 40


def test_a_burst_waits_and_is_answered(server: ServerProcess, client: GrpcClient) -> None:
    # The supervisor would take a process that says nothing for eight seconds for one that hangs.
    with faults.paused(server, "supervisor"), faults.paused(server, "grpc-server"):
        calls = [client.inference.Ping.future(empty_pb2.Empty(), timeout=60) for _ in range(2500)]
    assert {json.loads(call.result().health)["status"] for call in calls} == {"Healthy"}


def test_requests_are_counted_and_logged(server: ServerProcess, client: GrpcClient) -> None:
    before = counted(server, "echo")
    client.predict("echo", b"counted")
    server.predict("echo", b"counted")
    failure(lambda: client.predict("unheard-of"))
    eventually(lambda: counted(server, "echo") == before + 2, within=10, what="both requests counted")
    line = rf'(?m)^\S+ - /127\.0\.0\.1:\d+ "gRPC {re.escape(INFERENCE)}/Predictions HTTP/2\.0" (0|13) \d+$'
    eventually(
        lambda: set(re.findall(line, server.log("access_log.log"))) == {"0", "13"},
        within=10,
        what="both calls in the access log",
    )


# Errors


def test_errors_and_their_codes(client: GrpcClient) -> None:
    internal = grpc.StatusCode.INTERNAL
    missing = "org.pytorch.serve.archive.model.Model{}NotFoundException"
    assert failure(lambda: client.predict("nope")) == (internal, f"Model not found: nope\n{missing.format('')}")
    text = f"Model version: 9 does not exist for model: seen\n{missing.format('Version')}"
    assert failure(lambda: client.predict("seen", model_version="9")) == (internal, text)
    assert failure(lambda: client.predict("")) == (
        internal,
        "Parameter model_name is required.\nBadRequestException.()",
    )
    text = f"{NO_WORKER.format('idle')}\nInternalServerException.()"
    assert failure(lambda: client.predict("idle")) == (internal, text)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (b"400", grpc.StatusCode.INVALID_ARGUMENT),
        (b"401", grpc.StatusCode.UNAUTHENTICATED),
        (b"404", grpc.StatusCode.NOT_FOUND),
        (b"409", grpc.StatusCode.ABORTED),
        (b"418", grpc.StatusCode.FAILED_PRECONDITION),
        (b"429", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (b"500", grpc.StatusCode.INTERNAL),
        (b"504", grpc.StatusCode.DEADLINE_EXCEEDED),
        (b"599", grpc.StatusCode.INTERNAL),
    ],
)
def test_a_status_of_the_handler_becomes_a_code(client: GrpcClient, status: bytes, code: grpc.StatusCode) -> None:
    found = failure(lambda: client.predict("seen", input={"fail": status}))
    assert found == (code, "told to fail\norg.pytorch.serve.http.InternalServerException")


def test_a_handler_that_raises(client: GrpcClient) -> None:
    text = "Prediction failed\norg.pytorch.serve.http.InternalServerException"
    assert failure(lambda: client.predict("seen", input={"fail": b"raise"})) == (grpc.StatusCode.UNAVAILABLE, text)
    assert failure(lambda: list(client.stream("seen", input={"fail": b"raise"}))) == (
        grpc.StatusCode.UNAVAILABLE,
        text,
    )


def test_the_models_own_deadline(client: GrpcClient) -> None:
    code, text = failure(lambda: client.predict("late", input={"sleep": b"2"}))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "clientTimeoutInMills" in text


def cancelled(server: ServerProcess) -> int:
    """How many calls of predictions the access log has whose clients did not wait for the end."""
    return server.log("access_log.log").count(f'"gRPC {INFERENCE}/Predictions HTTP/2.0" 1 ')


def test_the_clients_deadline_frees_the_place(server: ServerProcess, client: GrpcClient, tmp_path: Path) -> None:
    before = cancelled(server)
    call, gate = held(client, tmp_path, timeout=8)
    assert call.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: cancelled(server) == before + 1, within=10, what="the cancelled call in the access log")
    gate.touch()
    assert json.loads(client.predict("seen"))["batch"] == 1


def test_what_is_cancelled_before_it_begins_is_never_run(
    server: ServerProcess, client: GrpcClient, tmp_path: Path
) -> None:
    before = cancelled(server)
    first, gate = held(client, tmp_path)
    calls = [client.inference.Predictions.future(request("seen", input={"sleep": b"20"})) for _ in range(20)]

    def under_way() -> int:
        """Those in the queue, and those that the worker has: several may lie ready in its mailbox."""
        text = server.request("metrics", "GET", "/metrics").text
        found = re.findall(r'(?m)^ts_(?:queue_depth|running_requests){model_name="seen",.*} (\S+)$', text)
        return sum(int(float(each)) for each in found)

    eventually(lambda: under_way() == 21, within=10, what="all calls at the batcher")
    for call in calls:
        call.cancel()
    eventually(lambda: cancelled(server) == before + 20, within=10, what="the cancelled calls in the access log")
    gate.touch()
    assert first.result()
    # The twenty would take longer than anybody waits.
    assert json.loads(client.predict("seen", timeout=60))["batch"] == 1


def test_unknown_methods_and_other_protocols(server: ServerProcess, client: GrpcClient) -> None:
    unknown = open_inference_pb2.ServerMetadataRequest()
    assert failure(lambda: client.open_inference.ServerMetadata(unknown))[0] == grpc.StatusCode.UNIMPLEMENTED
    before = len(server.output())
    for data in (b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\0" * 4096):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.ports["grpc_inference"]), timeout=60) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
    assert client.ping()
    assert len(server.output()) - before < 20_000


# Streams


def test_a_stream_as_in_the_tutorial(client: GrpcClient) -> None:
    prediction = [response.prediction.decode("utf-8") for response in client.stream("echo_stream", b"foo")]
    assert " ".join(prediction) == "hello hello hello hello hello world "


def test_a_handler_that_does_not_stream_gives_one_message(client: GrpcClient) -> None:
    assert [each.prediction for each in client.stream("echo", b"once")] == [b"once"]


def test_a_stream_whose_handler_fails_ends_with_an_error(client: GrpcClient) -> None:
    call = client.stream("chunks", b"3 100 fails")
    received = []
    with pytest.raises(grpc.RpcError) as caught:
        received.extend(each.prediction for each in call)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert len(received) <= 3


def test_a_slow_reader_holds_up_nobody(client: GrpcClient) -> None:
    slow = client.stream("chunks", b"4000 1024")  # more than the connection's windows and the stream's ring hold
    assert next(slow).prediction == b"%01024d" % 0
    for _ in range(3):
        assert sum(1 for _ in client.stream("chunks", b"10 10")) == 11
    rest = [each.prediction for each in slow]
    assert rest[-2:] == [b"%01024d" % 3999, b"end"]
    assert len(rest) == 4000


def test_a_reader_that_never_comes_loses_its_stream(client: GrpcClient) -> None:
    call = client.stream("chunks", b"2000 100000")
    next(call)
    assert sum(1 for _ in client.stream("chunks", b"10 10", timeout=60)) == 11  # the one worker is free again
    code, text = failure(lambda: list(call))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "wait for the client" in text


def test_a_client_that_cancels_leaves_a_continuous_batch(server: ServerProcess, client: GrpcClient) -> None:
    calls = [client.stream("steps") for _ in range(2)]
    for call in calls:
        for _ in range(3):
            assert next(call).prediction == b"step "
    for call in calls:
        call.cancel()
    removed = re.compile("Connection to client got closed; Removing job: ")
    eventually(lambda: len(removed.findall(server.log())) >= 2, within=10, what="both jobs gone")
    third = client.stream("steps")
    assert [next(third).prediction for _ in range(5)] == [b"step "] * 5
    third.cancel()


# Sequences


class Conversation:
    """A StreamPredictions2 call whose requests are sent one by one."""

    def __init__(self, client: GrpcClient) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self.responses = client.inference.StreamPredictions2(iter(self._requests.get, None), timeout=60)

    def say(self, model: str, data: bytes, sequence: str, **marks: bytes) -> None:
        fields = {"data": data, **marks}
        self._requests.put(inference_pb2.PredictionsRequest(model_name=model, input=fields, sequence_id=sequence))

    def hang_up(self) -> None:
        self._requests.put(None)


def test_requests_of_sequences_on_one_stream(server: ServerProcess, client: GrpcClient) -> None:
    conversation = Conversation(client)
    for number in (b"1", b"2", b"3"):
        conversation.say("counter", number, "one")
        conversation.say("counter", b"10", "other")
    conversation.say("counter", b"4", "one", ts_request_sequence_end=b"true")
    conversation.hang_up()
    answers: dict[str, list[Any]] = {"one": [], "other": []}
    for response in conversation.responses:
        key, total, ends = json.loads(response.prediction)
        assert response.sequence_id == key
        assert not response.HasField("status")
        answers[key].append((total, ends))
    assert answers == {
        "one": [(1, None), (3, None), (6, None), (10, "true")],
        "other": [(10, None), (20, None), (30, None)],
    }
    eventually(lambda: "SequenceId one is completed" in server.log(), within=10, what="the line in the log")


def test_errors_on_a_stream_of_sequences_do_not_end_it(client: GrpcClient) -> None:
    conversation = Conversation(client)

    def refusal() -> tuple[int, str, str]:
        response = next(conversation.responses)
        assert response.prediction == b""
        (detail,) = response.status.details
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        return response.status.code, response.status.message, info.reason

    conversation.say("counter", b"1", " ")
    assert refusal() == (13, "Parameter sequenceId is required.", "BadRequestException.()")
    conversation.say("nope", b"1", "s")
    reason = "org.pytorch.serve.archive.model.ModelNotFoundException"
    assert refusal() == (13, "Model not found: nope", reason)
    conversation.say("counter", b"1", "s\r\nx-forged: 1")
    assert refusal()[0] == 13
    conversation.say("counter", b"bad", "s")
    assert refusal() == (3, "no number", "org.pytorch.serve.http.InternalServerException")
    conversation.say("counter", b"5", "s")
    assert json.loads(next(conversation.responses).prediction) == ["s", 5, None]
    conversation.hang_up()
    assert list(conversation.responses) == []


def test_a_sequence_over_unary_calls_goes_on_where_it_was(client: GrpcClient) -> None:
    sums = [json.loads(client.predict("counter", b"2", sequence_id="unary"))[1] for _ in range(3)]
    assert sums == [2, 4, 6]
    (key, *_) = json.loads(client.predict("counter", b"2"))
    assert key.startswith("ts-seq-")
    long = "long " * 800
    assert json.loads(client.predict("counter", b"2", sequence_id=long))[:2] == [long.strip(), 2]
    code, text = failure(lambda: client.predict("counter", b"2", sequence_id=2 * long))
    assert (code, text.partition(" ")[0]) == (grpc.StatusCode.INTERNAL, "Parameter")


# The open inference protocol


def test_a_tensor_through_the_envelope_of_the_protocol(server: ServerProcess, client: GrpcClient) -> None:
    doubled = """
    def handle(data, context):
        if data is None:
            return None
        return [[each * 2 for each in row["data"]] for row in data]
    """
    archive(server.store, "enveloped", doubled, manifest_overrides={"envelope": "kservev2"})
    assert server.register("enveloped.mar").status == 200
    infer = open_inference_pb2.ModelInferRequest(model_name="enveloped", id="9")
    infer.inputs.add(name="x", datatype="INT64", shape=[2]).contents.int64_contents.extend([1, 2])
    answer = client.open_inference.ModelInfer(infer, timeout=60)
    assert (answer.id, answer.model_name, answer.model_version) == ("9", "enveloped", "1.0")
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("x", "INT64", [2])
    assert list(output.contents.int64_contents) == [2, 4]
    del infer.inputs[:]
    numbers = range(100_000)
    infer.inputs.add(name="x", datatype="INT64", shape=[len(numbers)]).contents.int64_contents.extend(numbers)
    answer = client.open_inference.ModelInfer(infer, timeout=60)
    assert list(answer.outputs[0].contents.int64_contents) == [2 * each for each in numbers]


def test_open_inference_protocol(server: ServerProcess, client: GrpcClient) -> None:
    archive(server.store, "kserve", KSERVE)
    assert server.register("kserve.mar").status == 200
    stub = client.open_inference
    assert stub.ServerLive(open_inference_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(open_inference_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(open_inference_pb2.ModelReadyRequest(name="kserve", version="1.0")).ready
    found = failure(lambda: stub.ModelReady(open_inference_pb2.ModelReadyRequest(name="nope")))
    assert found[0] == grpc.StatusCode.NOT_FOUND
    found = failure(lambda: stub.ModelReady(open_inference_pb2.ModelReadyRequest()))
    assert found == (grpc.StatusCode.INTERNAL, "Parameter name is required.\nBadRequestException.()")
    metadata = stub.ModelMetadata(open_inference_pb2.ModelMetadataRequest(name="kserve"))
    assert (metadata.name, list(metadata.versions), list(metadata.inputs)) == ("kserve", ["1.0"], [])
    infer = open_inference_pb2.ModelInferRequest(model_name="kserve", id="7")
    tensor = infer.inputs.add(name="numbers", datatype="FP32", shape=[2])
    tensor.contents.fp32_contents.extend([0.5, 2.0])
    tensor = infer.inputs.add(name="text", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hi")
    answer = stub.ModelInfer(infer, timeout=60)
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "kserve", "1.0")
    assert list(answer.outputs[0].contents.fp32_contents) == [0.5, 2.0]
    assert list(answer.outputs[1].contents.bytes_contents) == [b'"aGk="']
    infer.model_name = "nope"
    assert failure(lambda: stub.ModelInfer(infer))[0] == grpc.StatusCode.INTERNAL
    raw = open_inference_pb2.ModelInferRequest(model_name="kserve", raw_input_contents=[b"\1\0\0\0\2\0\0\0"])
    raw.inputs.add(name="raw", datatype="INT32", shape=[2])
    assert list(stub.ModelInfer(raw, timeout=60).outputs[0].contents.int_contents) == [1, 2]
    raw.inputs[0].datatype = "INT64"
    raw.raw_input_contents[0] = b"\1"
    assert failure(lambda: stub.ModelInfer(raw))[0] == grpc.StatusCode.INVALID_ARGUMENT
