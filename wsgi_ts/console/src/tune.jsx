// What `wsgi-ts tune` has measured: throughput against latency, and which configurations nothing beats.
import { useState } from "preact/hooks";
import { CurveChart, Plane } from "./charts.jsx";
import { count, ms } from "./format.js";
import { Card, Legend, Tabs, Title, useFetched } from "./parts.jsx";
import { json } from "./store.js";

export function Tune() {
  const { data, error } = useFetched(() => json("/console/tune"), 5);
  const [name, setName] = useState(null);
  const results = data?.results ?? [];
  const result = results.find((each) => each.model === name) ?? results[0];
  return (
    <>
      <Title note="wsgi-ts tune MODEL measures the running server; its last result of each model"
        end={results.length > 1 && <Tabs label="Model" value={result.model} onChange={setName} options={results.map((each) => [each.model, each.model])} />}>
        Tune
      </Title>
      {error && <p class="notice bad">{error.message}</p>}
      {data && !result && (
        <p class="empty card">
          Nothing measured yet: <code>wsgi-ts tune MODEL --slo p99=50ms</code>
        </p>
      )}
      {result && <Result result={result} />}
    </>
  );
}

const written = (slo) => (slo == null ? "none" : typeof slo === "object" ? Object.entries(slo).map(([key, value]) => `${key}=${value}`).join(", ") : String(slo));

const settingOf = (point) => `batches of ${point.batch_size}, ${point.workers} workers, ${point.threads || "all"} threads, ${point.policy ?? ""} ${ms(point.delay_ms)}`;

function Result({ result }) {
  const points = result.points.filter((point) => point.throughput > 0 && point.p99_ms != null);
  const sizes = (result.sizes ?? []).map((size) => ({ ...size, batches: 1 }));
  const front = points.filter((point) => point.pareto).sort((a, b) => a.p99_ms - b.p99_ms);
  const chosen = points.find((point) => point.chosen);
  const mostX = Math.max(1, ...points.map((point) => point.p99_ms)) * 1.08;
  const mostY = Math.max(1, ...points.map((point) => point.throughput)) * 1.12;
  const told = (point) => `${count(point.throughput)} requests/s at p99 ${ms(point.p99_ms)}: ${settingOf(point)}`;
  return (
    <div class="grid">
      <Card title={`${result.model}: throughput and p99`} className="w7" note={String(result.measured_at ?? "")} end={<Legend entries={[["c2", "nothing beats these"], ["c3", "chosen"]]} />}>
        <Plane label={`Measured configurations; chosen: ${chosen ? told(chosen) : "none"}`} height={330} mostX={mostX} mostY={mostY} showX={ms} showY={count} nameX="p99" nameY="requests/s"
          draw={(x, y) => (
            <>
              <polyline class="pareto" points={front.map((point) => `${x(point.p99_ms)},${y(point.throughput)}`).join(" ")} />
              {points.map((point, place) => (
                <circle key={place} class={`point ${point.pareto ? "front" : ""} ${point.chosen ? "chosen" : ""}`} cx={x(point.p99_ms)} cy={y(point.throughput)} r={point.chosen ? 8 : 5}>
                  <title>{told(point)}</title>
                </circle>
              ))}
            </>
          )}
        />
      </Card>
      <div class="w5 stack">
      <Card title="Chosen">
        <dl class="facts">
          <Fact name="objective" value={written(result.slo)} />
          {result.curve && <Fact name="a batch costs" value={`${ms(result.curve.a_ms)} + ${ms(result.curve.b_ms)} · n`} />}
          {chosen && (
            <>
              <Fact name="batch size" value={chosen.batch_size} />
              <Fact name="max delay" value={ms(chosen.delay_ms)} />
              <Fact name="workers" value={chosen.workers} />
              <Fact name="threads each" value={chosen.threads || "as many as fit"} />
              {chosen.policy && <Fact name="batching" value={chosen.policy} />}
              <Fact name="p99" value={ms(chosen.p99_ms)} />
              <Fact name="goodput" value={`${count(chosen.goodput)}/s`} />
              <Fact name="predicted" value={typeof chosen.predicted === "number" ? `${count(chosen.predicted)}/s` : String(chosen.predicted ?? "–")} />
            </>
          )}
        </dl>
        {(result.warnings ?? []).map((warning) => (
          <p class="note warn" key={warning}>
            {warning}
          </p>
        ))}
      </Card>
      {sizes.length > 0 && (
        <Card title="What a batch costs">
          <CurveChart points={sizes} curve={result.curve} batchSize={sizes.at(-1).n} />
        </Card>
      )}
      </div>
      <Card title="All that was measured" flush>
        <table>
          <thead>
            <tr>
              {["Batch", "Workers", "Threads", "Delay", "Requests/s", "p99", "Goodput"].map((name) => (
                <th scope="col" class="num" key={name}>
                  {name}
                </th>
              ))}
              <th scope="col">Verdict</th>
            </tr>
          </thead>
          <tbody>
            {[...points].sort((a, b) => b.goodput - a.goodput).map((point, place) => (
              <tr key={place}>
                <td class="num">{point.batch_size}</td>
                <td class="num">{point.workers}</td>
                <td class="num">{point.threads || "all"}</td>
                <td class="num">{ms(point.delay_ms)}</td>
                <td class="num">{count(point.throughput)}</td>
                <td class="num">{ms(point.p99_ms)}</td>
                <td class="num">{count(point.goodput)}</td>
                <td>
                  {point.chosen ? <span class="tag warn">chosen</span> : point.pareto ? <span class="tag good">nothing beats it</span> : <span class="faint">beaten</span>}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </Card>
    </div>
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
