// The models: versions, workers, batches, what a batch costs, and what can be done with them.
import { useEffect, useRef, useState } from "preact/hooks";
import { Bars, CurveChart } from "./charts.jsx";
import { bytes, count, ms, percent, span } from "./format.js";
import { modelKey, readyWorkers, total } from "./numbers.js";
import { Lamps } from "./overview.jsx";
import { Card, Confirm, Legend, say, Tabs, Title } from "./parts.jsx";
import { call, latest, rates } from "./store.js";

export function Models({ name, version }) {
  const now = latest();
  const model = now.models.find((each) => each.name === name && (!version || each.version === version));
  if (name && !model) return <Gone name={name} version={version} />;
  return model ? <Model model={model} now={now} key={modelKey(model)} /> : <All now={now} />;
}

const linkTo = (model) => `#/models/${encodeURIComponent(model.name)}/${encodeURIComponent(model.version)}`;

function Gone({ name, version }) {
  return (
    <>
      <Title>{name}</Title>
      <p class="empty">
        {name} {version} is not registered (any more). <a href="#/models">All models</a>
      </p>
    </>
  );
}

function All({ now }) {
  const seen = rates();
  return (
    <>
      <Title note={`${now.models.length} versions`}>Models</Title>
      {!now.models.length && <p class="empty card">No model is registered. POST /models registers one: see “Try it”.</p>}
      <div class="grid">
        {now.models.map((model) => {
          const rate = seen.get(modelKey(model));
          return (
            <section class="card w4" key={modelKey(model)} aria-label={modelKey(model)}>
              <header>
                <h2>
                  <a href={linkTo(model)}>{model.name}</a>
                </h2>
                <span class="note">{model.version}</span>
                <div class="end">{model.default && <span class="tag accent">default</span>}</div>
              </header>
              <div class="body stack">
                <Lamps model={model} />
                <dl class="facts">
                  <Fact name="requests/s" value={count(rate.rps)} />
                  <Fact name="p99" value={ms(rate.p99)} />
                  <Fact name="mean batch" value={`${count(rate.meanBatch)} of ${model.batch_size}`} />
                  <Fact name="queue" value={count(model.queued)} />
                </dl>
              </div>
            </section>
          );
        })}
      </div>
    </>
  );
}

function Fact({ name, value }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

function Model({ model, now }) {
  const [asking, ask] = useState(null);
  const [period, setPeriod] = useState("now");
  const rate = rates().get(modelKey(model));
  const recent = period === "now";
  const batch = recent ? rate.batch : model.batch;
  const latency = recent ? rate.latency : model.latency;
  const names = [...now.time_bounds_us.map((bound) => ms(bound / 1000)), "more"];
  const sizes = now.batch_bounds;
  const sizeNames = [...sizes.map((bound, place) => (place && sizes[place - 1] + 1 < bound ? `${sizes[place - 1] + 1}–${bound}` : `${bound}`)), "more"];
  const lastSize = Math.max(batch.findLastIndex((value) => value > 0), sizes.findIndex((bound) => bound >= model.batch_size), 3) + 1;
  const points = model.batch
    .map((batches, place) => ({ batches, n: batches ? model.requests_by_size[place] / batches : 0, ms: batches ? model.service_by_size_us[place] / batches / 1000 : 0 }))
    .filter((point) => point.batches);
  const first = latency.findIndex((value) => value > 0);
  const last = latency.findLastIndex((value) => value > 0);
  return (
    <>
      <Title note={`${model.url} · ${model.handler}`} end={<Actions model={model} now={now} ask={ask} />}>
        {model.name} <span class="faint">{model.version}</span> {model.default && <span class="tag accent">default</span>} {model.workflow && <span class="tag">workflow {model.workflow}</span>}
      </Title>
      {asking}
      <div class="grid">
        <Card title="Now" className="w8" note="last 10 s">
          <dl class="facts">
            <Fact name="requests/s" value={count(rate.rps)} />
            <Fact name="median" value={ms(rate.p50)} />
            <Fact name="p99" value={ms(rate.p99)} />
            <Fact name="mean batch" value={count(rate.meanBatch)} />
            <Fact name="queue" value={`${model.queued} / ${model.job_queue_size}`} />
            <Fact name="workers busy" value={percent(readyWorkers(model) ? rate.busy / readyWorkers(model) : 0)} />
            <Fact name="unanswered" value={count(rate.unanswered)} />
          </dl>
          <Flow rate={rate} />
        </Card>
        <Card title="Settings" className="w4">
          <dl class="facts">
            <Fact name="batch size" value={model.batch_size} />
            <Fact name="batching" value={model.continuous ? "continuous" : model.asynchronous ? "asynchronous" : model.batch_policy} />
            <Fact name="max delay" value={`${model.max_batch_delay_ms} ms`} />
            <Fact name="workers" value={`${model.min_workers}–${model.max_workers}`} />
            <Fact name="time-out" value={`${model.response_timeout_s} s`} />
            <Fact name="restarts" value={model.restarts} />
          </dl>
        </Card>
        <Card title="Workers" flush>
          <Workers model={model} now={now} />
        </Card>
        <Card title="Requests per batch" className="w6" note={`${count(total(batch))} batches`} end={<Period value={period} onChange={setPeriod} />}>
          {!total(batch) && <p class="empty">No batch {recent ? "in the last 10 s" : "yet"}.</p>}
          {total(batch) > 0 && <Bars label="Batches by size" bars={sizeNames.slice(0, lastSize).map((name, place) => [name, batch[place]])} unit=" requests" />}
        </Card>
        <Card title="What a batch costs" className="w6" note="since the start" end={<Legend entries={[["c1", "measured"], ...(model.curve ? [["c3", "learnt", `${ms(model.curve.a_ms)} + ${ms(model.curve.b_ms)} · n`]] : [])]} />}>
          {!points.length && <p class="empty">No batch yet.</p>}
          {points.length > 0 && <CurveChart points={points} curve={model.curve} batchSize={model.batch_size} />}
        </Card>
        <Card title="Latency" className="w6" note={`${count(total(latency))} requests`} end={<Period value={period} onChange={setPeriod} />}>
          {first < 0 && <p class="empty">No request {recent ? "in the last 10 s" : "yet"}.</p>}
          {first >= 0 && <Bars label="Requests by latency" tone="b2" unit=" or less" bars={names.slice(Math.max(0, first - 1), Math.max(last + 2, first + 6, 8)).map((name, place) => [name, latency[Math.max(0, first - 1) + place]])} />}
        </Card>
        <Card title="Without an answer of the handler" className="w6" note="since the start">
          <dl class="facts">
            <Fact name="refused: full queue" value={count(model.refused)} />
            <Fact name="expired in the queue" value={count(model.expired)} />
            <Fact name="cancelled by the client" value={count(model.cancelled)} />
            <Fact name="lost with a worker" value={count(model.failed)} />
          </dl>
        </Card>
      </div>
    </>
  );
}

function Period({ value, onChange }) {
  return <Tabs label="Period" value={value} onChange={onChange} options={[["now", "10 s"], ["all", "all"]]} />;
}

/** Where the time of a request goes, on average. */
function Flow({ rate }) {
  if (!rate.latencyMs) return <p class="note">No request in the last 10 s.</p>;
  const wait = Math.min(rate.queueMs, rate.latencyMs);
  const service = Math.min(rate.serviceMs ?? 0, rate.latencyMs - wait);
  const rest = Math.max(0, rate.latencyMs - wait - service);
  const parts = [["c3", "queue", wait], ["c1", "handler", service], ["c6", "hand-over and answer", rest]];
  return (
    <div class="stack">
      <div class="flow" role="img" aria-label={`Where the time goes: ${parts.map(([, name, value]) => `${name} ${ms(value)}`).join(", ")}`}>
        {parts.map(([tone, name, value]) => (
          <i class={tone} key={name} style={{ width: `${(value / rate.latencyMs) * 100}%` }} />
        ))}
      </div>
      <Legend entries={parts.map(([tone, name, value]) => [tone, name, ms(value)])} />
    </div>
  );
}

const LEVELS = { ready: "good", failed: "bad", backoff: "bad" };

function Workers({ model, now }) {
  const [open, setOpen] = useState(new Set());
  if (!model.workers.length) return <p class="empty">No worker: requests are answered 503. “Scale” starts some.</p>;
  const toggle = (id) => setOpen((before) => new Set(before.has(id) ? [...before].filter((each) => each !== id) : [...before, id]));
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Worker</th>
          <th scope="col">State</th>
          <th scope="col" class="num">pid</th>
          <th scope="col" class="num">Memory</th>
          <th scope="col" class="num">Runs for</th>
          <th scope="col" class="num">Loaded in</th>
          <th scope="col" class="num">Restarts</th>
          <th scope="col">Last end</th>
        </tr>
      </thead>
      <tbody>
        {model.workers.map((worker) => {
          const hasEnd = Boolean(worker.last_end || worker.last_lines?.length);
          const isOpen = hasEnd && (open.has(worker.id) || (worker.state !== "ready" && !open.has(-worker.id)));
          return (
            <>
              <tr key={worker.id}>
                <td>
                  {worker.id}
                  {worker.gpus.length > 0 && <span class="sub">GPU {worker.gpus.join(", ")}</span>}
                </td>
                <td>
                  <span class={`tag ${LEVELS[worker.state] ?? "warn"}`}>{worker.leaving ? "leaving" : worker.state}</span>
                  {worker.progress && worker.state !== "ready" && <span class="sub">{worker.progress}</span>}
                </td>
                <td class="num mono">{worker.pid > 0 ? worker.pid : "–"}</td>
                <td class="num">{bytes(worker.memory)}</td>
                <td class="num">{worker.pid > 0 ? span(Math.max(0, now.at - worker.since_ms / 1000)) : "–"}</td>
                <td class="num">{ms(worker.load_ms || null)}</td>
                <td class="num">{worker.restarts ?? 0}</td>
                <td>
                  {hasEnd ? (
                    <button type="button" class="plain" aria-expanded={!!isOpen} onClick={() => toggle(isOpen && !open.has(worker.id) ? -worker.id : worker.id)}>
                      <span class={worker.state === "ready" ? "" : "bad"}>{worker.last_end || "output"}</span> {isOpen ? "▴" : "▾"}
                    </button>
                  ) : (
                    <span class="faint">none</span>
                  )}
                </td>
              </tr>
              {isOpen && (
                <tr key={`${worker.id} end`}>
                  <td colSpan={8}>
                    <h3>Last lines of its output before it ended: {worker.last_end}</h3>
                    <Output lines={worker.last_lines} />
                  </td>
                </tr>
              )}
            </>
          );
        })}
      </tbody>
    </table>
  );
}

/** The last lines, of which the very last ones are seen first. */
function Output({ lines }) {
  const place = useRef();
  useEffect(() => {
    place.current.scrollTop = place.current.scrollHeight;
  }, [lines?.length, lines?.at(-1)]);
  return (
    <pre class="stderr" tabIndex={0} ref={place}>
      {lines?.join("\n") || "It has said nothing."}
    </pre>
  );
}

function Actions({ model, now, ask }) {
  const path = `/models/${encodeURIComponent(model.name)}/${encodeURIComponent(model.version)}`;
  const what = `${model.name} ${model.version}`;
  const done = () => ask(null);
  const carryOut = async (method, target) => {
    say(`${method} ${target} …`);
    try {
      const answer = await call(method, target);
      const said = await answer.json().catch(() => ({}));
      say(said.status ?? said.message ?? `${answer.status}`, !answer.ok);
    } catch (error) {
      say(String(error), true);
    }
  };
  const scale = () =>
    ask(
      <Confirm title={`Scale ${what}`} action="Scale" onClose={done} text="New workers load the model; those that go end with their batch."
        onConfirm={({ workers }) => carryOut("PUT", `${path}?min_worker=${Number(workers)}&max_worker=${Number(workers)}&synchronous=true`)}
        fields={
          <label class="field">
            Workers
            <input type="number" name="workers" min="0" max="1024" required defaultValue={model.min_workers} autofocus />
          </label>
        }
      />,
    );
  const makeDefault = () =>
    ask(
      <Confirm title={`Make ${model.version} the default version?`} action="Set default" onClose={done}
        text={`Requests for ${model.name} that name no version go to ${model.version} from then on.`}
        onConfirm={() => carryOut("PUT", `${path}/set-default`)} />,
    );
  const drain = () =>
    ask(
      <Confirm title={`Drain ${what}?`} action="Drain" danger onClose={done}
        text="Its workers end with the batches that they have. It stays registered, and requests for it are answered 503 until it is scaled again."
        onConfirm={() => carryOut("PUT", `${path}?min_worker=0&max_worker=0&synchronous=true`)} />,
    );
  const unregister = () =>
    ask(
      <Confirm title={`Unregister ${what}?`} action="Unregister" danger onClose={done}
        text="Requests that wait are still answered; then its workers end, and it is forgotten."
        onConfirm={() => carryOut("DELETE", path)} />,
    );
  return (
    <>
      <button type="button" onClick={scale}>Scale…</button>
      {!model.default && <button type="button" onClick={makeDefault}>Set default…</button>}
      <button type="button" class="danger" onClick={drain} disabled={!model.workers.length}>Drain…</button>
      <button type="button" class="danger" onClick={unregister} disabled={!now.server.model_api} title={now.server.model_api ? "" : "enable_model_api is off"}>
        Unregister…
      </button>
    </>
  );
}
