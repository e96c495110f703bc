"""The handler of all translators: a sentence comes in as text, and goes out as JSON beside its translation."""

import os

import torch


class Translate:
    """Loads the archive's TorchScript module, and asks it for each sentence of a batch."""

    def initialize(self, context):
        torch.set_num_threads(1)
        model_dir = context.system_properties["model_dir"]
        self.translate = torch.jit.load(os.path.join(model_dir, context.manifest["model"]["serializedFile"]))

    def handle(self, data, context):
        answers = []
        for row in data:
            sentence = row.get("data") or row["body"]
            if isinstance(sentence, bytearray):
                sentence = sentence.decode().strip()
            with torch.inference_mode():
                answers.append({"input": sentence, "translation": self.translate(sentence)})
        return answers
