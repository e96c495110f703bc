// Numbers as people read them.

export function count(value) {
  if (value == null || !isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9) return `${trim(value / 1e9)} G`;
  if (size >= 1e6) return `${trim(value / 1e6)} M`;
  if (size >= 1e4) return `${trim(value / 1e3)} k`;
  if (size >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return size < 0.1 ? value.toPrecision(1) : trim(value);
}

function trim(value) {
  const size = Math.abs(value);
  return String(+value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2));
}

export function ms(value) {
  if (value == null || !isFinite(value)) return "–";
  if (value >= 60000) return `${trim(value / 60000)} min`;
  if (value >= 1000) return `${trim(value / 1000)} s`;
  if (value >= 1 || value === 0) return `${trim(value)} ms`;
  return `${Math.round(value * 1000)} µs`;
}

export function bytes(value) {
  if (!value) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${trim(value)} ${units[place]}`;
}

export function percent(share) {
  if (share == null || !isFinite(share)) return "–";
  const value = share * 100;
  return `${value > 0 && value < 0.1 ? "<0.1" : trim(Math.min(100, +value.toFixed(value > 99 && value < 100 ? 2 : 1)))} %`;
}

export function span(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

export function shellQuoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}
