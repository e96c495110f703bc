// The graphs of workflows, with live numbers in their nodes.
import { count, ms, percent } from "./format.js";
import { total } from "./numbers.js";
import { Card, Title } from "./parts.jsx";
import { latest, workflowRates } from "./store.js";

const NODE = { width: 158, height: 66, columnGap: 62, rowGap: 26, margin: 12, stub: 56 };

export function Workflows() {
  const { workflows } = latest();
  return (
    <>
      <Title note={`${workflows.length} registered`}>Workflows</Title>
      {!workflows.length && <p class="empty card">No workflow is registered.</p>}
      <div class="grid">
        {workflows.map((workflow) => (
          <Workflow workflow={workflow} key={workflow.name} />
        ))}
      </div>
    </>
  );
}

function Workflow({ workflow }) {
  const rate = workflowRates(workflow);
  const all = total(Object.values(workflow.codes));
  const failed = all - workflow.codes["200"];
  return (
    <Card title={workflow.name} note="last 10 s">
      <div class="stack">
        <dl class="facts">
          <Fact name="requests/s" value={count(rate.rps)} />
          <Fact name="median" value={ms(rate.p50)} />
          <Fact name="p99" value={ms(rate.p99)} />
          <Fact name="answered since the start" value={count(all)} />
          <Fact name="failed" value={all ? `${count(failed)} (${percent(failed / all)})` : "0"} />
          <Fact name="retries" value={count(workflow.retries)} />
          <Fact name="too late" value={count(workflow.timeouts)} />
        </dl>
        <Graph workflow={workflow} rate={rate} />
      </div>
    </Card>
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

function Graph({ workflow, rate }) {
  const { drawing } = workflow;
  const column = (number) => NODE.margin + NODE.stub + number * (NODE.width + NODE.columnGap);
  const middle = (row) => NODE.margin + row * (NODE.height + NODE.rowGap) + NODE.height / 2;
  const byName = new Map(drawing.nodes.map((node) => [node.name, node]));
  const width = column(drawing.columns - 1) + NODE.width + NODE.stub + NODE.margin;
  const height = middle(drawing.rows - 1) + NODE.height / 2 + NODE.margin;
  const said = drawing.nodes.map((node) => `${node.name}: ${count(rate.nodes.get(node.name)?.rps)} a second, ${ms(rate.nodes.get(node.name)?.ms)}`).join("; ");
  const parents = new Set(drawing.edges.map((edge) => edge.from));
  const children = new Set(drawing.edges.map((edge) => edge.to));
  return (
    <div class="chart scrolls" tabIndex={0}>
      <svg viewBox={`0 0 ${width} ${height}`} style={{ maxWidth: `${width * 1.15}px`, minWidth: `${Math.min(width, 640)}px` }} role="img" aria-label={`Graph of ${workflow.name}. ${said}`}>
        {drawing.edges.map((edge) => (
          <path class={`edge ${rate.nodes.get(edge.to)?.rps > 0 ? "busy" : ""}`} key={`${edge.from} ${edge.to}`} d={way(edge, byName.get(edge.from).column, column, middle)} />
        ))}
        {drawing.nodes.map((node) => (
          <g key={node.name}>
            {!children.has(node.name) && <Stub from={NODE.margin} to={column(node.column)} y={middle(node.row)} text="request" busy={rate.rps > 0} />}
            {!parents.has(node.name) && <Stub from={column(node.column) + NODE.width} to={column(node.column) + NODE.width + NODE.stub} y={middle(node.row)} text="answer" busy={rate.rps > 0} />}
            <Node node={node} x={column(node.column)} y={middle(node.row)} seen={rate.nodes.get(node.name)} />
          </g>
        ))}
      </svg>
    </div>
  );
}

function Stub({ from, to, y, text, busy }) {
  return (
    <>
      <path class={`edge ${busy ? "busy" : ""}`} d={`M${from} ${y}H${to}`} />
      <text x={(from + to) / 2} y={y - 7} text-anchor="middle">
        {text}
      </text>
    </>
  );
}

function Node({ node, x, y, seen }) {
  const kind = node.is_function ? "function" : "model";
  const maybe = node.when || node.on_error !== "fail";
  const name = node.name.length > 19 ? `${node.name.slice(0, 18)}…` : node.name;
  const more = [kind, node.scatters ? "for each element" : "", node.gathers ? "gathers" : "", node.when ? "conditional" : ""].filter(Boolean).join(" · ");
  const graphic = (
    <g class={`node ${kind} ${maybe ? "maybe" : ""}`}>
      <title>{`${node.name}: ${kind}${node.when ? `, when ${node.when}` : ""}, on error: ${node.on_error}, ${node.timeout_ms} ms at most`}</title>
      <rect x={x} y={y - NODE.height / 2} width={NODE.width} height={NODE.height} rx="12" />
      <text class="strong" x={x + NODE.width / 2} y={y - 13} text-anchor="middle">
        {name}
      </text>
      <text x={x + NODE.width / 2} y={y + 3} text-anchor="middle">
        {more}
      </text>
      <text class="strong" x={x + NODE.width / 2} y={y + 22} text-anchor="middle">
        {seen?.ms != null ? `${count(seen.rps)}/s · ${ms(seen.ms)}` : "idle"}
      </text>
    </g>
  );
  if (node.is_function) return graphic;
  return <a href={`#/models/${encodeURIComponent(node.model)}`}>{graphic}</a>;
}

function way(edge, from, column, middle) {
  const y = edge.rows.map(middle);
  let path = `M${column(from) + NODE.width} ${y[0]}`;
  for (let step = 1; step < y.length; step += 1) {
    const x = column(from + step);
    const bend = NODE.columnGap / 2;
    path += ` C${x - bend} ${y[step - 1]} ${x - bend} ${y[step]} ${x} ${y[step]}`;
    if (step < y.length - 1) path += ` H${x + NODE.width}`;
  }
  return path;
}
