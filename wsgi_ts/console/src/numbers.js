// What two snapshots say together: rates, percentiles, means. All histograms are counts of fixed buckets.

export function less(now, before) {
  return now.map((value, place) => Math.max(0, value - (before?.[place] ?? 0)));
}

export function added(lists) {
  return lists.length ? lists[0].map((_, place) => lists.reduce((sum, each) => sum + each[place], 0)) : [];
}

export function total(list) {
  return list.reduce((sum, value) => sum + value, 0);
}

/** The value (in ms) below which a share of what was counted lies; within a bucket values are taken to lie evenly. */
export function percentile(counts, boundsUs, share) {
  const all = total(counts);
  if (!all) return null;
  let left = share * all;
  for (let place = 0; place < counts.length; place += 1) {
    if (counts[place] && left <= counts[place]) {
      const low = place ? boundsUs[place - 1] : 0;
      const high = boundsUs[place] ?? low;
      return (low + ((high - low) * left) / counts[place]) / 1000;
    }
    left -= counts[place];
  }
  return boundsUs.at(-1) / 1000;
}

/** How many of what was counted took no longer than a bound. */
export function within(counts, boundsUs, limitUs) {
  return counts.reduce((sum, value, place) => sum + (boundsUs[place] <= limitUs ? value : 0), 0);
}

export const modelKey = (model) => `${model.name}/${model.version}`;

/** What a model version has done between two snapshots. */
export function modelRates(model, before, seconds, boundsUs) {
  const old = before ?? null;
  const gone = (name) => Math.max(0, model[name] - (old ? old[name] : 0));
  const latency = less(model.latency, old?.latency);
  const answered = total(latency);
  const batches = gone("batches");
  const served = total(less(model.requests_by_size, old?.requests_by_size));
  return {
    seconds,
    latency,
    answered,
    rps: answered / seconds,
    arriving: gone("requests") / seconds,
    p50: percentile(latency, boundsUs, 0.5),
    p99: percentile(latency, boundsUs, 0.99),
    batches,
    batch: less(model.batch, old?.batch),
    meanBatch: batches ? served / batches : null,
    serviceMs: batches ? gone("service_us") / batches / 1000 : null,
    queueMs: answered ? gone("queue_us") / answered / 1000 : null,
    latencyMs: answered ? gone("latency_us") / answered / 1000 : null,
    busy: gone("service_us") / 1e6 / seconds,
    unanswered: gone("failed") + gone("expired") + gone("refused"),
  };
}

export function readyWorkers(model) {
  return model.workers.filter((worker) => worker.state === "ready" && !worker.leaving).length;
}
