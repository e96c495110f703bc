// The GPUs that models may use.
import { count, percent } from "./format.js";
import { modelKey } from "./numbers.js";
import { Card, Meter, Title } from "./parts.jsx";
import { latest } from "./store.js";

export function Gpus() {
  const { gpus, models } = latest();
  const on = (gpu) => models.filter((model) => model.workers.some((worker) => worker.gpus.includes(gpu)));
  return (
    <>
      <Title note={`${gpus.length} in use by this server`}>GPUs</Title>
      <div class="grid">
        {gpus.map((gpu) => {
          const memory = gpu.memory_total_mib ? gpu.memory_used_mib / gpu.memory_total_mib : 0;
          const power = gpu.power_limit_w ? gpu.power_w / gpu.power_limit_w : 0;
          return (
            <Card title={`GPU ${gpu.gpu}`} note={gpu.name} className="w6" key={gpu.gpu}>
              <div class="stack">
                <Row name="Busy" value={percent(gpu.utilization / 100)} share={gpu.utilization / 100} />
                <Row name="Memory" value={`${count(gpu.memory_used_mib / 1024)} of ${count(gpu.memory_total_mib / 1024)} GB`} share={memory} level={memory > 0.95 ? "warn" : ""} />
                {gpu.power_w != null && <Row name="Power" value={`${count(gpu.power_w)} W`} share={power} />}
                <p class="soft">
                  {gpu.temperature_c != null && `${count(gpu.temperature_c)} °C · `}
                  {on(gpu.gpu).map(modelKey).join(", ") || "no model"}
                </p>
              </div>
            </Card>
          );
        })}
      </div>
    </>
  );
}

function Row({ name, value, share, level }) {
  return (
    <div class="stack">
      <div class="row">
        <span class="soft">{name}</span>
        <b>{value}</b>
      </div>
      <Meter share={share} label={name} level={level} />
    </div>
  );
}
