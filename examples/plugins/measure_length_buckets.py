"""What `length_buckets.py` gains on ragged texts: one encoder (torch, a thread), served as it is and with the plugin.

python examples/plugins/measure_length_buckets.py [--texts 4000] [--clients 64]
"""

import argparse
import http.client
import json
import random
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from wsgi_ts.plugins.testing import PluginServer

HANDLER = """
import json, threading
import torch

class Encoder:
    def initialize(self, context):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.embed = torch.nn.Embedding(256, 64)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        self.initialized = True

    @torch.inference_mode()
    def handle(self, data, context):
        rows = [torch.tensor(list(bytes(row["body"])), dtype=torch.long) for row in data]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(padded.shape[1])[None] >= lengths[:, None]
        vectors = self.encoder(self.embed(padded), src_key_padding_mask=mask).mean(1)
        work = padded.numel() / len(rows)
        return [json.dumps({"work": work, "vector": vector[:2].tolist()}) for vector in vectors]
"""
CONFIG = "batchSize: 16\nmaxBatchDelay: 50\nminWorkers: 1\nmaxWorkers: 1\n{batching}"


def archive(folder: Path, name: str, batching: str) -> Path:
    manifest = {
        "runtime": "python",
        "model": {
            "modelName": name,
            "handler": "handler.py",
            "modelVersion": "1.0",
            "configFile": "model-config.yaml",
        },
    }
    path = folder / f"{name}.mar"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("handler.py", HANDLER)
        file.writestr("model-config.yaml", CONFIG.format(batching=batching))
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return path


def texts(count: int, seed: int = 0) -> list[bytes]:
    """Texts as people send them: most are short, some are long."""
    random.seed(seed)
    lengths = [min(500, max(8, int(random.lognormvariate(4.0, 1.0)))) for _ in range(count)]
    return [bytes(random.choices(range(97, 123), k=length)) for length in lengths]


def ask(server: PluginServer, model: str, clients: int, count: int) -> tuple[float, float]:
    """Sends so many texts; returns tokens a second, and the share of the model's work that was padding."""
    tokens, work = [0] * clients, [0.0] * clients

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)
        for text in texts(count // clients, number):
            connection.request("POST", f"/predictions/{model}", text, {"content-type": "application/octet-stream"})
            answer = json.loads(connection.getresponse().read())
            tokens[number] += len(text)
            if "work" not in answer:
                raise RuntimeError(f"{model}: {answer}")
            work[number] += answer["work"]
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(tokens) / (time.monotonic() - began), 1 - sum(tokens) / sum(work)


def measure(count: int, clients: int) -> dict[str, tuple[float, float]]:
    """Tokens a second and share of padding, of the built-in rule and of the plugin."""
    with tempfile.TemporaryDirectory() as folder:
        models = (archive(Path(folder), "fifo", ""), archive(Path(folder), "buckets", "batching: length-buckets\n"))
        plugin = Path(__file__).with_name("length_buckets.py")
        config = {"preload_modules": "torch", "job_queue_size": "1000", "slots_per_worker": "512"}
        server = PluginServer(Path(folder) / "server", plugin, models=models, config=config)
        server.start()
        try:
            for model in ("fifo", "buckets"):
                while server.post(f"/predictions/{model}", b"warm").status != 200:
                    time.sleep(0.1)
            # In turn, so that what the machine does besides hits both.
            rounds = [(model, ask(server, model, clients, count // 2)) for model in ("fifo", "buckets") * 2]
        finally:
            server.stop()
    found = {}
    for model in ("fifo", "buckets"):
        values = [value for name, value in rounds if name == model]
        found[model] = (sum(rate for rate, _ in values) / 2, sum(padding for _, padding in values) / 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    found = measure(options.texts, options.clients)
    for model, (rate, padding) in found.items():
        print(f"{model:8} {rate:8.0f} tokens/s  {padding:4.0%} of the work is padding")
    print(f"gain     {found['buckets'][0] / found['fifo'][0] - 1:+8.0%}")


if __name__ == "__main__":
    main()
