// The slowest and the failed requests, each as a waterfall of what it has waited for.
import { useState } from "preact/hooks";
import { clock, count, ms } from "./format.js";
import { Card, Copy, Tabs, Title, useFetched } from "./parts.jsx";
import { json } from "./store.js";

const TONES = { receive: "c6", wait: "c3", queue: "c3", batch: "whole", handover: "c4", preprocess: "c6", inference: "c1", postprocess: "c2", respond: "c6" };
const ORDERS = {
  slow: (a, b) => b.duration_ms - a.duration_ms,
  failed: (a, b) => b.started - a.started,
  last: (a, b) => b.started - a.started,
};

const ASKED = { slow: "?status=slow&limit=200", failed: "?status=failed&limit=60", last: "?limit=60" };

async function fetchTraces(order) {
  return (await json(`/debug/traces${ASKED[order]}`)).traces;
}

export function Requests() {
  const [order, setOrder] = useState("slow");
  const [chosen, choose] = useState(null);
  const { data, error } = useFetched(() => fetchTraces(order), 3, [order]);
  const all = data ?? [];
  const failed = (trace) => trace.error || trace.status >= 500;
  const shown = all.filter((trace) => order !== "failed" || failed(trace)).sort(ORDERS[order]).slice(0, 40);
  const trace = shown.find((each) => each.request_id === chosen) ?? shown[0];
  return (
    <>
      <Title note="What the server has kept of slow, failed and sampled requests" end={<Tabs label="Which requests" value={order} onChange={setOrder} options={[["slow", "Slowest"], ["failed", "Failed"], ["last", "Newest"]]} />}>
        Requests
      </Title>
      {error && <p class="notice bad">{String(error.message)}</p>}
      {data && !shown.length && <p class="empty card">{order === "failed" ? "No request has failed." : "No request was kept yet. The server keeps the slowest of each minute (trace_keep)."}</p>}
      {shown.length > 0 && (
        <div class="grid">
          <Card flush className="w6">
            <TraceTable traces={shown} chosen={trace} choose={choose} failed={failed} />
          </Card>
          <Card title="Waterfall" className="w6 stays" note={trace.request_id} end={<Copy text={`wsgi-ts explain ${trace.request_id}`} label="Copy the command that explains this request" />}>
            <Waterfall trace={trace} />
          </Card>
        </div>
      )}
    </>
  );
}

function TraceTable({ traces, chosen, choose, failed }) {
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Request</th>
          <th scope="col">Status</th>
          <th scope="col" class="num">Took</th>
          <th scope="col" class="num wide-only">Batch</th>
          <th scope="col" class="num">At</th>
        </tr>
      </thead>
      <tbody>
        {traces.map((trace) => (
          <tr class="link" key={trace.request_id} aria-selected={trace === chosen} onClick={() => choose(trace.request_id)}>
            <td>
              <button type="button" class="plain" onClick={() => choose(trace.request_id)}>
                {trace.model ?? trace.path}
              </button>
              <span class="sub">
                {trace.method} {trace.path}
              </span>
            </td>
            <td>
              <span class={`tag ${failed(trace) ? "bad" : "good"}`}>{trace.status}</span>
            </td>
            <td class="num">{ms(trace.duration_ms)}</td>
            <td class="num wide-only">{count(trace.batch_size)}</td>
            <td class="num">{clock(startOf(trace))}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

const startOf = (trace) => (typeof trace.started === "string" ? Date.parse(trace.started) / 1000 : trace.started);

function Waterfall({ trace }) {
  const spans = trace.spans;
  const end = Math.max(trace.duration_ms, ...spans.map((span) => span.start_ms + span.duration_ms), 0.001);
  const facts = [
    ["model", [trace.model, trace.version].filter(Boolean).join(" ")],
    ["worker", trace.worker],
    ["batch", trace.batch_size],
    ["batch went", trace.batch_close_reason],
    ["kept because", trace.kept_because],
    ["protocol", trace.protocol],
    ["trace", trace.trace_id],
  ];
  return (
    <div class="stack">
      {trace.error && <pre class="stderr">{trace.error}</pre>}
      <div class="waterfall" role="list" aria-label="Spans">
        <SpanRow span={{ name: "request", start_ms: 0, duration_ms: trace.duration_ms }} end={end} tone="whole" />
        {spans.map((span, place) => (
          <SpanRow span={span} end={end} tone={TONES[span.name] ?? "c5"} key={place} />
        ))}
      </div>
      <pre tabIndex={0}>wsgi-ts explain {trace.request_id}</pre>
      <dl class="facts">
        {facts
          .filter(([, value]) => value != null && value !== "")
          .map(([name, value]) => (
            <div key={name}>
              <dt>{name}</dt>
              <dd class={name === "trace" ? "mono" : ""}>{value}</dd>
            </div>
          ))}
      </dl>
    </div>
  );
}

function SpanRow({ span, end, tone }) {
  const more = Object.entries(span.attributes ?? {}).map(([name, value]) => `${name}: ${value}`).join("\n");
  const place = { left: `${(span.start_ms / end) * 100}%`, width: `${Math.max(0, (span.duration_ms / end) * 100)}%` };
  return (
    <div class="span-row" role="listitem" title={more}>
      <span class={`label ${span.attributes?.node ? "inner" : ""}`}>{span.name}</span>
      <span class="track" aria-hidden="true">
        <i class={tone} style={place} />
      </span>
      <span class="right">{ms(span.duration_ms)}</span>
    </div>
  );
}
