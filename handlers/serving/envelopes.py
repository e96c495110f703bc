"""Request envelopes: unwrap the JSON of a protocol before the handler sees it, wrap up what it returns."""

from __future__ import annotations

import base64
import copy
import inspect
import json
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any

from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.errors import BatchFailure, PredictionException, UnreadableRows
from wsgi_ts.handlers.serving.inputs import content_of
from wsgi_ts.handlers.serving.results import WRONG_LENGTH

#: numpy's name of each data type of the Open Inference Protocol.
_NUMPY_TYPES = {
    "BOOL": "bool",
    **{f"{kind.upper()}{bits}": f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_PROTOCOL_TYPES = {numpy_name: name for name, numpy_name in _NUMPY_TYPES.items()}
_NO_BODY = (
    "The request has no JSON object: its body is empty, or was read as a form, as which curl -d sends it."
    " Send it with content-type: application/json."
)


class BaseEnvelope:
    """Wraps a handler's entry point; the derived classes say what is unwrapped and wrapped up."""

    def __init__(self, handle_fn: Callable[[Any, Any], Any]) -> None:
        self._handle_fn = handle_fn
        self.context: Context | None = None
        self._rows_per_request: list[int] = []

    def handle(self, data: Any, context: Context) -> Any:
        """Runs the handler between `parse_input` and `format_output`; nothing is done to empty data.

        Raises:
            UnreadableRows: `parse_input` can read some of several rows, or none.
        """
        self.context = context
        if data:
            data = self._read(data)
        results = self._handle_fn(data, context)
        if inspect.isawaitable(results):
            # Other requests are read meanwhile: a copy keeps what `parse_input` has noted of this one.
            return copy.copy(self)._format_when_there(results)
        if results:
            results = self.format_output(results)
        return results

    async def _format_when_there(self, results: Awaitable[Any]) -> Any:
        found = await results
        return self.format_output(found) if found else found

    def parse_input(self, data: list[dict[str, Any]]) -> Any:
        """Returns the handler's data from the rows of the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define parse_input")

    def format_output(self, data: list[Any]) -> list[Any]:
        """Returns the answers from the handler's results."""
        raise NotImplementedError(f"{type(self).__name__} does not define format_output")

    def _read(self, rows: list[dict[str, Any]]) -> Any:
        """Returns what `parse_input` makes of the rows; where it cannot read all of several, says of each why."""
        try:
            return self.parse_input(rows)
        except PredictionException as error:
            if len(rows) == 1:
                raise
            errors = {place: found for place, row in enumerate(rows) if (found := self._fault_of(row)) is not None}
            raise UnreadableRows(errors or {0: error}) from error

    def _fault_of(self, row: dict[str, Any]) -> PredictionException | None:
        try:
            self.parse_input([row])
        except PredictionException as error:
            return error
        return None

    def _joined(self, batches: list[list[Any]]) -> list[Any]:
        """Returns the rows of all requests in one list, and notes how many each has."""
        self._rows_per_request = [len(batch) for batch in batches]
        return [row for batch in batches for row in batch]

    def _per_request(self, data: list[Any]) -> list[list[Any]]:
        """Returns the results of each request, by how many rows it had; a lone request gets all, however many they are.

        Raises:
            BatchFailure: several requests, and not one result per row.
        """
        counts = self._rows_per_request
        if len(counts) == 1:
            return [list(data)]
        if len(data) != sum(counts):
            raise BatchFailure(WRONG_LENGTH, f"the handler returned {len(data)} results for {sum(counts)} rows")
        results = iter(data)
        return [list(islice(results, count)) for count in counts]


class BodyEnvelope(BaseEnvelope):
    """The handler gets the bodies themselves."""

    def parse_input(self, data: list[dict[str, Any]]) -> list[Any]:
        """Returns the body, or the field `data`, of each request."""
        return [content_of(row) for row in data]

    def format_output(self, data: list[Any]) -> list[Any]:
        """Returns the results as they are."""
        return data


class JSONEnvelope(BaseEnvelope):
    """`{"instances": […]}` in, `{"predictions": […]}` out."""

    def parse_input(self, data: list[dict[str, Any]]) -> list[Any]:
        """Returns the instances of all requests in one list; `{"b64": …}` becomes bytes.

        Raises:
            PredictionException: a body is not such JSON (400).
        """
        return self._joined([[_plain_value(instance) for instance in _field(row, "instances")] for row in data])

    def format_output(self, data: list[Any]) -> list[str]:
        """Returns one JSON text per request, with as many predictions as it had instances."""
        return [json.dumps({"predictions": list(map(_readable, results))}) for results in self._per_request(data)]


class KServeEnvelope(BaseEnvelope):
    """KServe's v1 protocol: `{"instances": […]}` in, predictions or explanations out."""

    def parse_input(self, data: list[dict[str, Any]]) -> list[Any]:
        """Returns the instances of all requests in one list.

        Raises:
            PredictionException: a body is not such JSON (400).
        """
        return self._joined([_field(row, "instances") for row in data])

    def format_output(self, data: list[Any]) -> list[dict[str, Any]]:
        """Returns one answer per request, with as many results as it had instances; a lone request gets all."""
        return [{self._key(row): list(map(_readable, results))} for row, results in enumerate(self._per_request(data))]

    def _key(self, row: int) -> str:
        explain = self.context is not None and self.context.get_request_header(row, "explain") == "True"
        return "explanations" if explain else "predictions"


class KServev2Envelope(BaseEnvelope):
    """KServe's v2 protocol: named and typed tensors in and out."""

    def __init__(self, handle_fn: Callable[[Any, Any], Any]) -> None:
        super().__init__(handle_fn)
        self._request_ids: list[Any] = []
        self._input_names: list[list[str]] = []

    def parse_input(self, data: list[dict[str, Any]]) -> list[Any]:
        """Returns the tensors of all requests in one list, each a row as the request has it, with its `data` unpacked.

        `data` becomes nested lists of the given shape, and of BYTES the one text, or a list of them where there are
        more.

        Raises:
            PredictionException: a body is not such JSON (400).
        """
        self._request_ids = [_json_object(row).get("id") for row in data]
        batches = [[_tensor(position, tensor) for position, tensor in enumerate(_field(row, "inputs"))] for row in data]
        self._input_names = [[tensor["name"] for tensor in batch] for batch in batches]
        return self._joined(batches)

    def format_output(self, data: list[Any]) -> list[dict[str, Any]]:
        """Returns one answer per request, with one output tensor per result, flattened, named as the input it is for.

        A lone request gets all results; those beyond its inputs are named by their number.
        """
        context = self.context
        if context is None:
            raise RuntimeError("format_output is called by handle, after the context is known")
        manifest_model = (context.manifest or {}).get("model", {})
        return [
            {
                "id": _given_id(self._request_ids[row]) or context.get_request_id(row),
                # A test's own context has fewer attributes than ours.
                "model_name": manifest_model.get("modelName") or getattr(context, "model_name", None),
                "model_version": manifest_model.get("modelVersion"),
                "outputs": _outputs(self._input_names[row], results),
            }
            for row, results in enumerate(self._per_request(data))
        ]


def _json_object(row: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a request; a row without `data` and `body` is the object itself, as in TorchServe."""
    body = content_of(row)
    if body is None and "instances" in row:
        body = row
    if isinstance(body, (bytes, bytearray, str)):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise PredictionException("The request body is not JSON.", 400) from error
    if body is None:
        raise PredictionException(_NO_BODY, 400)
    if not isinstance(body, dict):
        raise PredictionException("The request body is not a JSON object.", 400)
    return body


def _field(row: dict[str, Any], name: str) -> Any:
    values = _json_object(row).get(name)
    if not isinstance(values, list):
        raise PredictionException(f'The request body has no list "{name}".', 400)
    return values


def _plain_value(instance: Any) -> Any:
    """Base64 objects decoded, at any place in the instance."""
    if isinstance(instance, list):
        return [_plain_value(element) for element in instance]
    if not isinstance(instance, dict):
        return instance
    if set(instance) == {"b64"}:
        try:
            return base64.b64decode(instance["b64"], validate=True)
        except (TypeError, ValueError) as error:
            raise PredictionException('A value "b64" is not base64.', 400) from error
    return {key: _plain_value(value) for key, value in instance.items()}


def _readable(result: Any) -> Any:
    return bytes(result).decode("utf-8") if isinstance(result, (bytes, bytearray)) else result


def _given_id(value: Any) -> Any:
    """Returns the request's own id; None for blanks."""
    return value.strip() and value if isinstance(value, str) else value


def _tensor(position: int, tensor: Any) -> dict[str, Any]:
    try:
        kind, values = tensor["datatype"], tensor["data"]
        if kind == "BYTES":
            # KServe's own sample for images has one text of base64 that is in no list, and -1 for its shape.
            texts = [values] if isinstance(values, str) else values
            unpacked = list(texts) if isinstance(texts, list) and len(texts) > 1 else texts[0]
        else:
            # Imported here: only this envelope needs numpy.
            import numpy

            numbers = numpy.array(values, dtype=_NUMPY_TYPES[kind])
            # TorchServe asks for no shape.
            unpacked = (numbers.reshape(tensor["shape"]) if "shape" in tensor else numbers).tolist()
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise PredictionException(
            f'An element of "inputs" is no tensor with datatype, shape and data: {error}', 400
        ) from error
    return {**tensor, "name": str(tensor.get("name", f"input-{position}")), "data": unpacked}


def _outputs(names: list[str], results: list[Any]) -> list[dict[str, Any]]:
    more = (f"predict-{position}" for position in range(len(names), len(results)))
    return [_output(name, result) for name, result in zip([*names, *more], results, strict=False)]


def _output(name: str, result: Any) -> dict[str, Any]:
    if isinstance(result, (str, bytes, bytearray)):
        return {"name": name, "shape": [1], "datatype": "BYTES", "data": [_readable(result)]}
    import numpy

    values = numpy.asarray(result).flatten()
    kind = _PROTOCOL_TYPES.get(values.dtype.name, "BYTES")
    data = values.tolist()
    if kind == "BYTES" and values.dtype.kind != "O":
        data = [each if isinstance(each, str) else str(_readable(each)) for each in data]
    return {"name": name, "shape": [len(data)], "datatype": kind, "data": data}
