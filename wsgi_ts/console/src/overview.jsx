// The first page: how the server is doing.
import { Spark, TimeChart } from "./charts.jsx";
import { bytes, count, ms, percent, span } from "./format.js";
import { modelKey, readyWorkers } from "./numbers.js";
import { Card, Legend, Meter, Title } from "./parts.jsx";
import { latest, overview, rates, setSlo, state } from "./store.js";

const BAD_STATES = new Set(["backoff", "failed"]);

export function Overview() {
  const now = latest();
  const { series } = state;
  const sums = overview(10);
  const workers = now.models.flatMap((model) => model.workers.filter((worker) => !worker.leaving));
  const ready = workers.filter((worker) => worker.state === "ready").length;
  const capacity = now.models.reduce((sum, model) => sum + model.job_queue_size, 0);
  return (
    <>
      <Title note={`${now.server.hostname} · wsgi-ts ${now.server.version} · up ${span(now.server.uptime_s)}`}>Overview</Title>
      <Notices now={now} />
      <div class="tiles">
        <Tile name="Requests" value={count(sums.answered)} unit="/s" more={`${count(sums.running)} under way`} spark={series.answered} />
        <Tile name="Median" value={ms(sums.p50)} more="of the last 10 s" spark={series.p50} tone="s2" />
        <Tile name="p99" value={ms(sums.p99)} more="of the last 10 s" spark={series.p99} tone="s5" />
        <Tile name="Goodput" value={count(sums.good)} unit="/s" more={<Goodput now={now} share={sums.answered ? sums.good / sums.answered : null} />} spark={series.good} tone="s2" />
        <Tile name="Server errors" value={count(sums.server)} unit="/s" level={sums.server > 0 ? "bad" : ""} more={`${count(now.answers["5xx"])} since the start`} spark={series.server} tone="s4" />
        <Tile name="Queue" value={count(sums.queue)} more={capacity ? `of ${count(capacity)} places` : ""} spark={series.queue} tone="s3" />
        <Tile name="Workers" value={`${ready}`} unit={`/ ${workers.length} ready`} level={ready < workers.length ? "warn" : ""} more={`${now.models.length} model versions`} />
      </div>
      <div class="grid">
        <Card title="Answers per second" className="w6" end={<Legend entries={[["c1", "2xx"], ["c3", "4xx"], ["c4", "5xx"]]} />}>
          <TimeChart label="Answers per second" times={series.t} lines={[["s1", "2xx", series.ok], ["s3", "4xx", series.client], ["s4", "5xx", series.server]]} />
        </Card>
        <Card title="Latency" note="arrival to answer, last 10 s" className="w6" end={<Legend entries={[["c5", "p99"], ["c2", "median"]]} />}>
          <TimeChart label="Latency" times={series.t} show={ms} lines={[["s5", "p99", series.p99], ["s2", "median", series.p50]]} />
        </Card>
        <div class="w8 stack">
        <Card title="Models" flush>
          <ModelTable models={now.models} />
        </Card>
        <Card title="Processes" flush>
          <Processes rows={now.server.processes} />
        </Card>
        </div>
        <div class="w4 stack">
        <Card title="Queue and work under way" end={<Legend entries={[["c3", "queue"], ["c6", "running"]]} />}>
          <TimeChart label="Queue and running requests" times={series.t} height={200} lines={[["s3", "queue", series.queue], ["s6", "running", series.running]]} />
        </Card>
        <Card title="Server">
          <dl class="facts lines">
            {Object.entries(now.server.addresses).map(([name, address]) => (
              <div key={name}>
                <dt>{name}</dt>
                <dd class="mono">{address}</dd>
              </div>
            ))}
            <div>
              <dt>cores</dt>
              <dd>{now.server.cores}</dd>
            </div>
            <div>
              <dt>TorchServe's interface</dt>
              <dd>{now.server.torchserve_version}</dd>
            </div>
          </dl>
          <p class="note">Data path: {now.server.data_path}</p>
        </Card>
        </div>
      </div>
    </>
  );
}

function Tile({ name, value, unit, more, spark, tone, level = "" }) {
  return (
    <div class="card tile">
      {spark && <Spark values={spark} tone={tone} />}
      <div class="name">{name}</div>
      <div class={`value ${level}`}>
        {value}
        {unit && <small>{unit}</small>}
      </div>
      <div class="more">{more}</div>
    </div>
  );
}

function Goodput({ now, share }) {
  return (
    <>
      {share == null ? "≤ " : `${percent(share)} ≤ `}
      <select aria-label="Latency up to which an answer is good" value={state.sloUs} onChange={(event) => setSlo(Number(event.target.value))}>
        {now.time_bounds_us.slice(4).map((bound) => (
          <option value={bound} key={bound}>
            {ms(bound / 1000)}
          </option>
        ))}
      </select>
    </>
  );
}

function Notices({ now }) {
  const found = [];
  if (now.server.draining) found.push(["bad", "The server is stopping", "Requests under way are answered, no more are taken."]);
  for (const model of now.models) {
    const failing = model.workers.filter((worker) => BAD_STATES.has(worker.state));
    const where = <a href={`#/models/${encodeURIComponent(model.name)}/${encodeURIComponent(model.version)}`}>{modelKey(model)}</a>;
    if (failing.length) {
      found.push(["bad", <>{failing.length} of {model.workers.length} workers of {where} fail</>, failing[0].last_lines?.at(-1) || failing[0].last_end || ""]);
    }
    if (model.job_queue_size && model.queued >= 0.8 * model.job_queue_size) {
      found.push(["warn", <>The queue of {where} is nearly full</>, `${model.queued} of ${model.job_queue_size} places; further requests are answered 503.`]);
    }
  }
  if (!found.length) return null;
  return (
    <div class="notices" role="list">
      {found.slice(0, 5).map(([level, title, what]) => (
        <div class={`notice ${level}`} role="listitem" key={what}>
          <span class={`dot ${level}`} />
          <span>
            {title} <span class="what">{what}</span>
          </span>
        </div>
      ))}
    </div>
  );
}

export function Lamps({ model }) {
  const level = (worker) => (worker.state === "ready" ? "good" : BAD_STATES.has(worker.state) ? "bad" : "warn");
  const shown = model.workers.slice(0, 24);
  return (
    <span class="lamps" role="img" aria-label={`${readyWorkers(model)} of ${model.workers.length} workers ready`}>
      {shown.map((worker) => (
        <i class={level(worker)} key={worker.id} />
      ))}
    </span>
  );
}

function ModelTable({ models }) {
  if (!models.length) return <p class="empty">No model is registered.</p>;
  const seen = rates();
  const open = (model) => {
    location.hash = `#/models/${encodeURIComponent(model.name)}/${encodeURIComponent(model.version)}`;
  };
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Model</th>
          <th scope="col">Workers</th>
          <th scope="col" class="num">Requests/s</th>
          <th scope="col" class="num">p50</th>
          <th scope="col" class="num">p99</th>
          <th scope="col" class="num">Mean batch</th>
          <th scope="col" class="num">Queue</th>
          <th scope="col" class="widest-only">Busy</th>
        </tr>
      </thead>
      <tbody>
        {models.map((model) => {
          const rate = seen.get(modelKey(model));
          const busy = readyWorkers(model) ? rate.busy / readyWorkers(model) : 0;
          return (
            <tr class="link" key={modelKey(model)} onClick={() => open(model)}>
              <td>
                <a href={`#/models/${encodeURIComponent(model.name)}/${encodeURIComponent(model.version)}`}>{model.name}</a>
                <span class="sub">
                  {model.version}
                  {model.default ? " · default" : ""}
                  {model.workflow ? ` · of workflow ${model.workflow}` : ""}
                </span>
              </td>
              <td>
                <Lamps model={model} />
              </td>
              <td class="num">{count(rate.rps)}</td>
              <td class="num">{ms(rate.p50)}</td>
              <td class="num">{ms(rate.p99)}</td>
              <td class="num">{count(rate.meanBatch)}</td>
              <td class="num">{count(model.queued)}</td>
              <td class="widest-only">
                <Meter share={busy} label={`${model.name}: workers busy`} level={busy > 0.95 ? "warn" : ""} />
              </td>
            </tr>
          );
        })}
      </tbody>
    </table>
  );
}

function Processes({ rows }) {
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Process</th>
          <th scope="col">State</th>
          <th scope="col" class="num">pid</th>
          <th scope="col" class="num">Memory</th>
          <th scope="col" class="num">Starts</th>
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <tr key={row.role}>
            <td>{row.role}</td>
            <td>
              <span class={`tag ${row.state === "running" || row.state === "ready" ? "good" : "warn"}`}>{row.state}</span>
            </td>
            <td class="num mono">{row.pid ?? "–"}</td>
            <td class="num">{bytes(row.memory)}</td>
            <td class="num">{row.starts ?? "–"}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
