"""The small model for bodies that are JSON, as handlers commonly do it: on top of BaseHandler."""

import torch
from mlp import Mlp

from ts.torch_handler.base_handler import BaseHandler


class JsonHandler(BaseHandler):
    """BaseHandler's preprocess, inference and postprocess; only the loading is its own."""

    def initialize(self, context):
        """Makes the model."""
        self.context = context
        self.device = torch.device("cpu")
        self.model = Mlp().module
        self.initialized = True

    def preprocess(self, data):
        """One tensor of all rows, from lists of numbers that the server has parsed."""
        return super().preprocess([row.get("data") or row.get("body") for row in data])
