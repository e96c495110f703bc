// Charts: series over time by uPlot, all others as SVG.
import uPlot from "uplot";
import { useEffect, useRef } from "preact/hooks";
import { clock, count, ms } from "./format.js";
import { colour, useTheme } from "./theme.jsx";

/** Series over time. `lines`: [colour, name, values]; `show` writes a value; `filled` of them have areas. */
export function TimeChart({ label, times, lines, show = count, height = 190, filled = true }) {
  const place = useRef();
  const chart = useRef();
  const now = useTheme();
  const data = [times, ...lines.map(([, , values]) => values)];
  const newest = useRef(data);
  newest.current = data;
  useEffect(() => {
    const axis = { stroke: colour("faint"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const options = {
      width: place.current.clientWidth || 300,
      height,
      padding: [10, 6, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "all" }, points: { size: 7 }, drag: { x: false, y: false } },
      scales: { x: { time: true }, y: { range: (_, __, most) => [0, most > 0 ? most * 1.12 : 1] } },
      axes: [
        { ...axis, space: 80, size: 26, values: (_, splits) => splits.map(clock) },
        { ...axis, size: 58, values: (_, splits) => splits.map((value) => show(value)) },
      ],
      series: [
        {},
        ...lines.map(([tone, name], number) => ({
          label: name,
          stroke: colour(tone),
          width: 2,
          points: { show: false },
          spanGaps: true,
          fill: filled && number === 0 ? `color-mix(in srgb, ${colour(tone)} 14%, transparent)` : undefined,
        })),
      ],
    };
    chart.current = new uPlot(options, newest.current, place.current);
    const watcher = new ResizeObserver(() => place.current && chart.current?.setSize({ width: place.current.clientWidth, height }));
    watcher.observe(place.current);
    return () => {
      watcher.disconnect();
      chart.current.destroy();
      chart.current = null;
    };
  }, [now, lines.length, height]);
  useEffect(() => chart.current?.setData(data));
  const said = lines.map(([, name, values]) => `${name} ${show(values.at(-1))}`).join(", ");
  return <div class="chart" ref={place} role="img" aria-label={`${label}: now ${said}`} />;
}

export function Spark({ values, tone = "s1" }) {
  const shown = values.slice(-60).map((value) => value ?? 0);
  if (shown.length < 2) return null;
  const most = Math.max(...shown, 1e-9);
  const points = shown.map((value, place) => `${((place / (shown.length - 1)) * 100).toFixed(2)},${(30 - (value / most) * 26).toFixed(2)}`);
  return (
    <svg class="spark" viewBox="0 0 100 32" preserveAspectRatio="none" aria-hidden="true">
      <polygon points={`0,32 ${points.join(" ")} 100,32`} fill={`var(--${tone})`} opacity="0.16" />
      <polyline points={points.join(" ")} fill="none" stroke={`var(--${tone})`} stroke-width="1.4" vector-effect="non-scaling-stroke" />
    </svg>
  );
}

const WIDTH = 520;
const LEFT = 46;
const RIGHT = 12;

function Frame({ label, height, children }) {
  return (
    <div class="chart">
      <svg viewBox={`0 0 ${WIDTH} ${height}`} role="img" aria-label={label}>
        {children}
      </svg>
    </div>
  );
}

/** Counts as bars: `bars` are [name, value]. */
export function Bars({ label, bars, show = count, height = 170, tone = "", unit = "" }) {
  const most = Math.max(...bars.map(([, value]) => value), 1e-12);
  const step = (WIDTH - 8) / bars.length;
  const floor = height - 20;
  const every = Math.ceil(bars.length / 12);
  const said = bars.filter(([, value]) => value).map(([name, value]) => `${name}${unit}: ${show(value)}`).join(", ");
  return (
    <Frame label={`${label}: ${said || "nothing yet"}`} height={height}>
      <line class="axis" x1="0" x2={WIDTH} y1={floor} y2={floor} />
      {bars.map(([name, value], place) => {
        const high = value ? Math.max(2, (value / most) * (floor - 22)) : 0;
        const x = 4 + place * step;
        return (
          <g key={name}>
            <title>{`${name}${unit}: ${show(value)}`}</title>
            <rect class={`bar ${tone}`} x={x + step * 0.12} y={floor - high} width={step * 0.76} height={high} rx={Math.min(4, high / 2)} />
            {place % every === 0 && (
              <text x={x + step / 2} y={height - 4} text-anchor="middle">
                {name}
              </text>
            )}
            {value > 0 && bars.length <= 12 && (
              <text class="strong" x={x + step / 2} y={floor - high - 6} text-anchor="middle">
                {show(value)}
              </text>
            )}
          </g>
        );
      })}
    </Frame>
  );
}

function ticks(most, wanted = 4) {
  const rough = most / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, place) => place * step);
}

/** Points and lines between two axes from 0; `draw` gets the functions from values to places. */
export function Plane({ label, mostX, mostY, showX, showY, nameX, nameY, height = 230, draw }) {
  const floor = height - 36;
  const x = (value) => LEFT + (value / mostX) * (WIDTH - LEFT - RIGHT);
  const y = (value) => floor - (value / mostY) * (floor - 18);
  return (
    <Frame label={label} height={height}>
      {ticks(mostY).map((value) => (
        <g key={`y${value}`}>
          <line class="axis" x1={LEFT} x2={WIDTH - RIGHT} y1={y(value)} y2={y(value)} />
          <text x={LEFT - 7} y={y(value) + 4} text-anchor="end">
            {showY(value)}
          </text>
        </g>
      ))}
      {ticks(mostX, 6).map((value) => (
        <text key={`x${value}`} x={x(value)} y={floor + 16} text-anchor="middle">
          {showX(value)}
        </text>
      ))}
      <text x={LEFT} y={9}>
        {nameY}
      </text>
      <text x={WIDTH - RIGHT} y={height - 4} text-anchor="end">
        {nameX}
      </text>
      {draw(x, y)}
    </Frame>
  );
}

/** Service times by batch size: what was measured, and the line a + b·n that the batching rule has learnt. */
export function CurveChart({ points, curve, batchSize }) {
  const mostX = Math.max(2, batchSize, ...points.map((point) => point.n)) * 1.06;
  const onLine = (n) => curve.a_ms + curve.b_ms * n;
  const mostY = Math.max(0.001, ...points.map((point) => point.ms), curve ? onLine(mostX) : 0) * 1.12;
  const most = Math.max(1, ...points.map((point) => point.batches));
  const said = points.map((point) => `${count(point.n)} requests ${ms(point.ms)}`).join(", ");
  const learnt = curve ? `; learnt ${ms(curve.a_ms)} + ${ms(curve.b_ms)} · n` : "";
  return (
    <Plane label={`Service time by batch size, measured: ${said || "nothing yet"}${learnt}`} mostX={mostX} mostY={mostY} showX={count} showY={ms} nameX="requests in a batch" nameY="service time"
      draw={(x, y) => (
        <>
          {curve && <line class="fit" x1={x(0)} y1={y(onLine(0))} x2={x(mostX)} y2={y(onLine(mostX))} />}
          {points.map((point) => (
            <circle class="seen" key={point.n} cx={x(point.n)} cy={y(point.ms)} r={4 + 6 * Math.sqrt(point.batches / most)}>
              <title>{`${count(point.n)} requests: ${ms(point.ms)}`}</title>
            </circle>
          ))}
        </>
      )}
    />
  );
}
