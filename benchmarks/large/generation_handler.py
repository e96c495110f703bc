"""The handler of the generation measurement: the same steps, batch by batch or joined between steps.

A request's body is the number of tokens it wants; each token is streamed as its number and a space. Which decoder:
`handler: {decoder: gpt}` or `fixed` in model-config.yaml.
"""

from decoders import FixedCost, SmallGPT

from ts.handler_utils.utils import send_intermediate_predict_response


class GenerationHandler:
    """With `continuousBatching: true` each call is one step, else a call generates all that its batch asks for."""

    def initialize(self, context):
        """Makes the decoder, with a row of its cache for each request of a batch."""
        options = context.model_yaml_config["handler"]
        rows = context.system_properties["batch_size"]
        self.decoder = SmallGPT(rows, options["longest"]) if options["decoder"] == "gpt" else FixedCost(rows)
        self.continuous = context.model_yaml_config.get("continuousBatching", False)
        self.free = list(range(rows))
        self.under_way = {}  # request id -> [row of the cache, tokens to come]

    def handle(self, data, context):
        """One step, or all of them."""
        return self.one_step(data, context) if self.continuous else self.whole_batch(data, context)

    def one_step(self, data, context):
        """A token for each request under way."""
        ids = list(context.request_ids.values())
        for gone in self.under_way.keys() - set(ids):
            self.free.append(self.under_way.pop(gone)[0])
        for row, request_id in enumerate(ids):
            if data[row]:
                place = self.free.pop()
                self.decoder.begin(place)
                self.under_way[request_id] = [place, int(data[row]["body"])]
        states = [self.under_way[request_id] for request_id in ids]
        tokens = self.decoder.step([place for place, _ in states])
        for state in states:
            state[1] -= 1
        context.stopping_criteria = [lambda _, state=state: state[1] == 0 for state in states]
        return [f"{token} " for token in tokens]

    def whole_batch(self, data, context):
        """All tokens of a batch; a row that has its own is left out of the steps that follow."""
        left = [int(row["body"]) for row in data]
        for row in range(len(data)):
            self.decoder.begin(row)
        while rows := [row for row, count in enumerate(left) if count]:
            chunks = [""] * len(data)
            for row, token in zip(rows, self.decoder.step(rows), strict=True):
                chunks[row] = f"{token} "
                left[row] -= 1
            ids = {row: context.request_ids[row] for row in rows}
            send_intermediate_predict_response(chunks, ids, "", 200, context)
        return [""] * len(data)
