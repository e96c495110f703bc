"""What handlers do, or do to the process that runs them, and what becomes of it.

Each behaviour is Python code that a request brings along; the handler below runs it in the middle of its batch. The
code sees the batch (`data`, `context`, `answers`, its own `place` in it) and may do what it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Answers with its process and the request's body, unless a request brings code along.
HANDLER = """
import os

def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(row.get("body") or b"") for row in data]
    answers = [f"{os.getpid()} ".encode() + body for body in bodies]
    scope = {"data": data, "context": context, "answers": answers}
    for place, body in enumerate(bodies):
        if body.startswith(b"do:"):
            scope["place"] = place
            exec(body[3:].decode("utf-8", "surrogatepass"), scope)
    return scope["answers"]
"""


@dataclass(frozen=True)
class Behaviour:
    """One thing that a handler does.

    Attributes:
        name: says what.
        code: that the handler runs.
        statuses: of the request that brings it; 200 means that it is answered like any other.
        others: of the requests beside it in its batch.
        lives: whether the worker goes on; None: it may, or may be replaced.
        hangs: the worker may answer nothing any more, and is ended by its response time-out.
    """

    name: str
    code: str
    statuses: frozenset[int]
    others: frozenset[int]
    lives: bool | None = True
    hangs: bool = False


BEHAVIOURS: list[Behaviour] = []
FAILED = frozenset({503})
FINE = frozenset({200})


def _fails(name: str, code: str, *statuses: int) -> None:
    """Fails the whole batch, as with TorchServe; the worker goes on."""
    allowed = frozenset(statuses or FAILED)
    BEHAVIOURS.append(Behaviour(name, code, allowed, allowed | FINE))


def _alone(name: str, code: str, *statuses: int) -> None:
    """Concerns its own request alone."""
    BEHAVIOURS.append(Behaviour(name, code, frozenset(statuses), FINE))


def _harmless(name: str, code: str) -> None:
    """Leaves a process behind in which nothing is as it was, and which goes on all the same."""
    BEHAVIOURS.append(Behaviour(name, code, FINE, FINE))


def _hurts(name: str, code: str) -> None:
    """May cost the worker, but no more than its batch."""
    allowed = FINE | {500, 503, 507}
    BEHAVIOURS.append(Behaviour(name, code, allowed, allowed, lives=None, hangs=True))


def _ends(name: str, code: str, *statuses: int) -> None:
    """Ends the worker: its batch is answered, and the next worker goes on."""
    allowed = frozenset(statuses or {500})
    BEHAVIOURS.append(Behaviour(name, code, allowed, allowed | FINE, lives=False))


def _hangs(name: str, code: str) -> None:
    """Never comes back: the response time-out ends the worker, and the next one goes on."""
    BEHAVIOURS.append(Behaviour(name, code, frozenset({500}), FINE | {500}, lives=False, hangs=True))


# Exceptions
_fails("an exception", "raise ValueError('no')")
_fails("an exception without text", "raise Exception")
_fails("an exception whose text raises", "class E(Exception):\n def __str__(self): raise OSError\nraise E")
_fails("an exception whose text is none", "class E(Exception):\n def __str__(self): return 3\nraise E")
_fails("an exception whose repr exits", "class E(Exception):\n def __repr__(self): raise SystemExit\nraise E")
_fails("an exception with a text of 10 MB", "raise ValueError('x' * 10_000_000)")
_fails("an exception with half a surrogate pair", "raise ValueError('\\ud800')")
_fails("an exception with control characters", "raise ValueError('a\\r\\n\\x1b[2J\\0')")
_fails("an exception that caused itself", "e = ValueError(1); e.__cause__ = e; e.__context__ = e\nraise e")
_fails(
    "an exception behind a thousand others",
    "e = None\nfor n in range(1000):\n f = ValueError(n); f.__cause__ = e; e = f\nraise e",
)
_fails("a group of exceptions", "raise BaseExceptionGroup('g', [SystemExit(1), KeyboardInterrupt(), ValueError(2)])")
_fails("an exception class with a broken hash", "class E(Exception):\n __hash__ = None\nraise E")
_fails("SystemExit", "raise SystemExit(0)")
_fails("sys.exit with a text", "import sys; sys.exit('bye')")
_fails("KeyboardInterrupt", "raise KeyboardInterrupt")
_fails("GeneratorExit", "raise GeneratorExit")
_fails("StopIteration", "raise StopIteration(3)")
_fails("CancelledError", "import asyncio\nraise asyncio.CancelledError")
_fails("an exception of its own kind", "class Odd(BaseException): pass\nraise Odd")
_fails("an exception without a module", "raise type('E', (Exception,), {'__module__': None})()")
_fails("endless recursion", "def f(): f()\nf()")
_fails("code that does not compile", "compile('(', '', 'exec')")
_fails("an import that is not there", "import no_such_module_at_all")
_fails("out of memory", "raise MemoryError", 507)
_fails("CUDA in the text", "raise RuntimeError('CUDA error: an illegal memory access was encountered')", 507)
_fails(
    "a status of its own", "from ts.utils.util import PredictionException\nraise PredictionException('no', 418)", 418
)
_fails("no such status", "from ts.utils.util import PredictionException\nraise PredictionException('no', 99)", 500)
_fails(
    "a status without a body",
    "from ts.utils.util import PredictionException\nraise PredictionException('no', 204)",
    500,
)
_fails(
    "a status that is no number",
    "from ts.utils.util import PredictionException\nraise PredictionException(None, 'x')",
    500,
)
_fails("a generator that fails half way", "def g():\n yield b'a'\n raise ValueError\nanswers = list(g())")
_fails("an async generator as the answer", "async def g():\n yield b'a'\nanswers = g()")
_fails("a coroutine that fails", "async def f():\n raise ValueError\nanswers = f()")

# What it returns
_fails("nothing", "answers = None")
_fails("a table", "answers = {}")
_fails("a tuple", "answers = tuple(answers)")
_fails("a generator", "answers = (a for a in [b''] * len(data))")
_fails("a text", "answers = 'x' * len(data)")
_fails("one too few", "answers = answers[1:]")
_fails("one too many", "answers = answers + [b'']")
_fails(
    "a list that lies about its length",
    "class L(list):\n def __len__(self): return 1 << 62\nanswers = L(answers[1:])",
    *(503, 507),
)
_fails("an object", "answers[place] = object()")
_fails("a function", "answers[place] = lambda: 1")
_fails("a set", "answers[place] = {1}")
_fails("the context", "answers[place] = context")
_alone("a circle", "a = []; a.append(a); answers[place] = a", 503)
_alone("100 000 lists in each other", "a = []\nfor _ in range(100_000): a = [a]\nanswers[place] = a", 503)
_alone("half a surrogate pair", "answers[place] = '\\ud800'", 503)
_alone("NaN", "answers[place] = [float('nan')]", 200)
_alone("keys of many types", "answers[place] = {1: 2, None: 3, True: 4}", 200)
_alone("64 MB", "answers[place] = bytes(64 << 20)", 500)
_alone("a text of 64 MB", "answers[place] = 'x' * (64 << 20)", 500)
_alone(
    "a subclass of bytes", "class B(bytes):\n def __len__(self): return 1 << 40\nanswers[place] = B(b'ok')", 200, 500
)

# The answer's head
_alone("status 0", "context.set_response_status(0, '', place)", 500)
_alone("status 99", "context.set_response_status(99, '', place)", 500)
_alone("status 1000", "context.set_response_status(1000, '', place)", 500)
_alone("status 204 with a body", "context.set_response_status(204, '', place)", 500)
_alone("a status that is a text", "context.set_response_status('200', '', place)", 500)
_alone("a phrase with a line end", "context.set_response_status(200, 'OK\\r\\nX: y', place)", 500)
_alone("a phrase that is not ASCII", "context.set_response_status(200, 'Schön', place)", 500)
_alone("a header with a line end", "context.set_response_header(place, 'X', 'a\\r\\nSet-Cookie: b')", 500)
_alone("a header name with a colon", "context.set_response_header(place, 'X: y\\r\\nZ', 'a')", 500)
_alone("a header with NUL", "context.set_response_header(place, 'X', '\\0')", 500)
_alone("a header that is no text", "context.set_response_header(place, 'X', 3)", 500)
_alone("its own framing", "context.set_response_header(place, 'Content-Length', '1')", 200)
_alone("a megabyte of headers", "context.set_response_header(place, 'X', 'y' * (1 << 20))", 500)

# What it does to its process, which goes on so: what would spoil others comes behind them
_harmless(
    "children of multiprocessing",
    "import multiprocessing, time\n"
    "multiprocessing.get_context('fork').Process(target=time.sleep, args=(9,), daemon=True).start()",
)
_harmless("slow switches of threads", "import sys; sys.setswitchinterval(100)")
_harmless(
    "a hundred open files",
    "import os; kept = [os.open('/dev/null', os.O_RDONLY) for _ in range(100)]; import builtins; builtins.kept = kept",
)
_harmless("another folder", "import os; os.chdir('/')")
_harmless("a folder that is gone", "import os, tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)")
_harmless("another umask", "import os; os.umask(0o777)")
_harmless("no environment", "import os; os.environ.clear()")
_harmless("another locale", "import locale; locale.setlocale(locale.LC_ALL, 'C')")
_harmless("no module path", "import sys; sys.path.clear()")
_harmless("signals ignored", "import signal\nfor n in (1, 2, 3, 13, 15, 17): signal.signal(n, signal.SIG_IGN)")
_harmless("signals blocked", "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())")
_harmless(
    "a thread that never ends", "import threading, time; threading.Thread(target=time.sleep, args=(9999,)).start()"
)
_harmless(
    "a hundred threads",
    "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
)
_harmless("a child that outlives it", "import subprocess; subprocess.Popen(['sleep', '999'])")
_harmless(
    "a child in a session of its own", "import subprocess; subprocess.Popen(['sleep', '998'], start_new_session=True)"
)
_harmless(
    "a daemon",
    "import os\nif os.fork() == 0:\n os.setsid()\n"
    " if os.fork() == 0: os.execvp('sleep', ['sleep', '997'])\n os._exit(0)",
)
_harmless("a fork that returns as well", "import os\npid = os.fork()")
_harmless("a fork that raises", "import os\nif os.fork() == 0: raise ValueError")
_harmless(
    "50 MB printed",
    "print('x' * 1000 + '\\n', end='', flush=True)\nimport os\nfor _ in range(50): os.write(1, b'y' * 1_000_000)",
)
_harmless("a line without an end", "import os; os.write(1, b'z' * 3_000_000)")
_harmless("binary output", "import os; os.write(1, bytes(range(256)) * 100 + b'\\n'); os.write(2, b'\\xff\\0\\n')")
_harmless(
    "metrics that are none",
    "print('[METRICS]' + 'x.y:1e999|#a:b|#type:GAUGE|#hostname:h,1,' + 'r' * 9000); print('[METRICS]\\0')",
)
_harmless("no garbage collection", "import gc; gc.disable(); gc.freeze()")
_harmless("a lower priority", "import os; os.nice(5)")
_harmless("warnings that raise", "import warnings; warnings.simplefilter('error')")
_harmless("no logging", "import logging; logging.disable(); logging.root.handlers.clear()")
_harmless(
    "logging that raises",
    "import logging\nclass H(logging.Handler):\n def emit(self, r): raise OSError\nlogging.root.addHandler(H())",
)
_harmless("clocks that stand still", "import time; time.time = time.monotonic = lambda: 0.0")
_harmless(
    "an alarm that is caught",
    "import signal; signal.signal(signal.SIGALRM, lambda *a: None); signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)",
)
_harmless("a data list that is emptied", "data.clear()")
_harmless("a broken json", "import json; json.dumps = json.loads = None")
_harmless("no json", "import sys; sys.modules['json'] = None")
_harmless("no stdout", "import sys; sys.stdout = sys.stderr = None")
_harmless(
    "a stdout that raises", "import sys\nclass F:\n def __getattr__(self, name): raise OSError(name)\nsys.stdout = F()"
)
_harmless("a closed stdout", "import sys; sys.stdout = sys.__stdout__; sys.stdout.close()")
_harmless("stdout and stderr closed below", "import os; os.close(1); os.close(2)")
_hurts(
    "few descriptors",
    "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))",
)
_hurts(
    "threads that compute for ever",
    "import threading\ndef spin():\n while True: sum(range(1000))\nthreading.Thread(target=spin, daemon=True).start()",
)
_hurts("little recursion", "import sys; sys.setrecursionlimit(60)")
_hurts("a context without anything", "vars(context).clear()")
_hurts(
    "an alarm that raises",
    "import signal\ndef stop(*a): raise TimeoutError\n"
    "signal.signal(signal.SIGALRM, stop); signal.setitimer(signal.ITIMER_REAL, 0.3)",
)
_hurts("a broken len", "import builtins; builtins.len = None")
_hurts("a broken isinstance", "import builtins; builtins.isinstance = None")
_hurts("a tracer that raises", "import sys\ndef t(*a): raise ValueError\nsys.settrace(t); sys.setprofile(t)")
_hurts("descriptors closed", "import os; os.closerange(0, 1024)")
_hurts(
    "little memory",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 28, resource.RLIM_INFINITY))\n"
    "x = bytearray(1 << 30)",
)
_hurts("Python's own loop stopped", "import asyncio; asyncio.set_event_loop(None); asyncio.new_event_loop = None")
_hurts(
    "its own service broken",
    "import gc\nfor o in gc.get_objects():\n if type(o).__name__ in ('Service', 'ModelWorker'): vars(o).clear()",
)
_hurts(
    "shared memory let go",
    "import gc\nfor o in gc.get_objects():\n if type(o).__name__ in ('Segment', 'SharedMemory'): o.close()",
)
_hurts(
    "its own slots scribbled over",
    "import gc\nfor o in gc.get_objects():\n if type(o).__name__ == 'ModelWorker':\n  for r in o._places:\n"
    "   s = r.segment.layout.slot(r.slot); r.segment.buffer[s : s + 4096] = b'\\xff' * 4096",
)

# How it ends
for _code, _status in ((0, 500), (1, 500), (3, 500), (4, 500), (137, 507)):
    _ends(f"exit {_code}", f"import os; os._exit({_code})", _status)
_ends("abort", "import os; os.abort()")
_ends("a segmentation fault", "import ctypes; ctypes.string_at(0)")
_ends("SIGKILL", "import os; os.kill(os.getpid(), 9)", 507)
_ends("SIGTERM", "import os, signal, time; signal.signal(15, signal.SIG_DFL); os.kill(os.getpid(), 15); time.sleep(9)")
_ends("SIGBUS", "import os, signal; os.kill(os.getpid(), signal.SIGBUS)")
_ends("another program", "import os; os.execv('/bin/true', ['true'])")
_ends(
    "an alarm",
    "import signal, time; signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.setitimer(0, 0.1); time.sleep(9)",
)
_hangs("an endless loop", "while True: pass")
_hangs("a sleep", "import time; time.sleep(999)")
_hangs("a sleep with the interpreter's lock", "import ctypes; ctypes.PyDLL(None).sleep(999)")
_hangs("SIGSTOP", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
_hangs("a lock that is never given", "import threading; l = threading.Lock(); l.acquire(); l.acquire()")
_ends(
    "everything in its process group killed",
    "import os; os.killpg(0, 9) if os.getpgid(0) == os.getpid() else os.kill(os.getpid(), 9)",
    507,
)
_ends("its template killed", "import os, time; os.kill(os.getppid(), 9); time.sleep(9)", 500, 507)
_ends(
    "its batcher stopped for a moment, and itself killed",
    "import os, signal, psutil\np = psutil.Process().parent().parent().pid\n"
    "os.kill(p, signal.SIGSTOP); os.kill(p, signal.SIGCONT); os.kill(os.getpid(), 9)",
    507,
)
