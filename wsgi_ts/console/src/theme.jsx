// Dark and light: as the machine has it, until somebody chooses.
import { useLayoutEffect, useState } from "preact/hooks";
import { Icon } from "./parts.jsx";

const system = matchMedia("(prefers-color-scheme: dark)");
const KEY = "wsgi-ts-theme";
const listeners = new Set();

export function theme() {
  return localStorage.getItem(KEY) ?? (system.matches ? "dark" : "light");
}

export function applyTheme() {
  document.documentElement.dataset.theme = theme();
  for (const listener of listeners) listener(theme());
}

system.addEventListener("change", applyTheme);

export function useTheme() {
  const [now, set] = useState(theme());
  useLayoutEffect(() => {
    listeners.add(set);
    return () => listeners.delete(set);
  }, []);
  return now;
}

export function ThemeButton() {
  const now = useTheme();
  const other = now === "dark" ? "light" : "dark";
  const change = () => {
    localStorage.setItem(KEY, other);
    applyTheme();
  };
  return (
    <button type="button" class="plain" onClick={change} aria-label={`Switch to ${other} colours`}>
      <Icon name={now === "dark" ? "sun" : "moon"} />
    </button>
  );
}

/** The value of a colour of the style sheet, for what draws on a canvas. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
