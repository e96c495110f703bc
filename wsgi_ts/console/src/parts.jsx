// Small parts that all panels are made of.
import { useEffect, useLayoutEffect, useReducer, useRef, useState } from "preact/hooks";
import { subscribe } from "./store.js";

const ICONS = {
  overview: "M3 12l5-6 4 4 5-7 4 9M3 20h18",
  models: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM12 12l8-4.5M12 12v9M12 12L4 7.5",
  requests: "M4 6h10M8 12h12M6 18h8",
  workflows: "M5 12a2 2 0 104 0 2 2 0 00-4 0M15 6a2 2 0 104 0 2 2 0 00-4 0M15 18a2 2 0 104 0 2 2 0 00-4 0M9 11l6-4M9 13l6 4",
  try: "M5 4l14 8-14 8z",
  tune: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4v6M9 14v6",
  gpus: "M6 6h12v12H6zM10 10h4v4h-4zM9 2v4M15 2v4M9 18v4M15 18v4M2 9h4M2 15h4M18 9h4M18 15h4",
  settings: "M12 15a3 3 0 100-6 3 3 0 000 6zM19 12l2 1-2 4-2-1-2 1v2h-5v-2l-2-1-2 1-2-4 2-1v-2l-2-1 2-4 2 1 2-1V3h5v2l2 1 2-1 2 4-2 1z",
  docs: "M6 3h9l4 4v14H6zM14 3v5h5M9 13h7M9 17h7",
  sun: "M12 8a4 4 0 100 8 4 4 0 000-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M19 5l-1.5 1.5M6.5 17.5L5 19",
  moon: "M20 14a8 8 0 01-10-10 8 8 0 1010 10z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
};

export function Icon({ name, size = 17 }) {
  return (
    <svg width={size} height={size} viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
      <path d={ICONS[name]} />
    </svg>
  );
}

/**
 * Draws a component anew with each snapshot. It listens before the browser draws it for the first time: an effect that
 * runs only after that misses what is told meanwhile, and the sign-in would never be shown.
 */
export function useStore() {
  const [, draw] = useReducer((number) => number + 1, 0);
  useLayoutEffect(() => subscribe(draw), []);
}

export function Card({ title, note, end, children, className = "", flush = false }) {
  return (
    <section class={`card ${className}`} aria-label={title}>
      {title && (
        <header>
          <h2>{title}</h2>
          {note && <span class="note">{note}</span>}
          {end && <div class="end">{end}</div>}
        </header>
      )}
      <div class={flush ? "flush" : "body"}>{children}</div>
    </section>
  );
}

export function Tabs({ label, value, options, onChange }) {
  return (
    <div class="tabs" role="group" aria-label={label}>
      {options.map(([key, text]) => (
        <button type="button" key={key} aria-pressed={key === value} onClick={() => onChange(key)}>
          {text}
        </button>
      ))}
    </div>
  );
}

export function Copy({ text, label }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  if (!navigator.clipboard) return null;
  return (
    <button type="button" class="plain" onClick={copy} aria-label={label}>
      <Icon name="copy" size={15} /> {done ? "Copied" : "Copy"}
    </button>
  );
}

export function Meter({ share, label, level = "" }) {
  const width = `${Math.min(100, Math.max(0, share * 100)).toFixed(1)}%`;
  return (
    <div class="meter" role="meter" aria-label={label} aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round(share * 100)}>
      <i class={level} style={{ width }} />
    </div>
  );
}

export function Legend({ entries }) {
  return (
    <div class="legend">
      {entries.map(([color, name, value]) => (
        <span key={name}>
          <i class={color} />
          {name}
          {value != null && <b>{value}</b>}
        </span>
      ))}
    </div>
  );
}

/** A question in front of everything else; `fields` are shown in it, `onConfirm` gets what was entered. */
export function Confirm({ title, text, action, danger, fields, onConfirm, onClose }) {
  const dialog = useRef();
  // As part of the click that asks: a key that is pressed at once is already the dialog's.
  useLayoutEffect(() => dialog.current.showModal(), []);
  // `close` gives the focus back.
  const close = () => {
    dialog.current.close();
    onClose();
  };
  const key = (event) => {
    if (event.key !== "Escape") return;
    event.preventDefault();
    close();
  };
  // What else closes a dialog (a phone's way back) tells of it by an event that comes later: perhaps after this question
  // has gone, and then it must not close the next one.
  const closed = () => dialog.current && onClose();
  const submit = (event) => {
    event.preventDefault();
    onConfirm(Object.fromEntries(new FormData(event.target)));
    close();
  };
  return (
    <dialog ref={dialog} onKeyDown={key} onClose={closed} aria-labelledby="question">
      <form onSubmit={submit}>
        <h2 id="question">{title}</h2>
        <p class="soft">{text}</p>
        {fields}
        <div class="row">
          <button type="button" onClick={close}>
            Cancel
          </button>
          <button type="submit" class={`main-action ${danger ? "danger" : ""}`}>
            {action}
          </button>
        </div>
      </form>
    </dialog>
  );
}

const toasts = { list: [], draw: () => {} };

export function say(text, isBad = false) {
  const toast = { text, isBad };
  toasts.list = [...toasts.list.slice(-3), toast];
  toasts.draw();
  setTimeout(() => {
    toasts.list = toasts.list.filter((each) => each !== toast);
    toasts.draw();
  }, 7000);
}

export function Toasts() {
  const [, draw] = useReducer((number) => number + 1, 0);
  toasts.draw = draw;
  return (
    <div class="toasts" role="status" aria-live="polite">
      {toasts.list.map((toast) => (
        <div class={`toast ${toast.isBad ? "bad" : ""}`} key={toast.text}>
          {toast.text}
        </div>
      ))}
    </div>
  );
}

/** What a function fetches, and again every so many seconds while it is shown. */
export function useFetched(fetcher, everyS, inputs = []) {
  const [found, setFound] = useState({ data: null, error: null });
  useEffect(() => {
    let gone = false;
    let timer;
    const look = async () => {
      try {
        const data = await fetcher();
        if (!gone) setFound({ data, error: null });
      } catch (error) {
        if (!gone) setFound((before) => ({ ...before, error }));
      }
      if (!gone && everyS) timer = setTimeout(look, everyS * 1000);
    };
    void look();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, inputs);
  return found;
}

let isOpened = false;

/** The heading of a panel: whoever goes there by keyboard, or hears the page, is there at once. */
export function Title({ children, note, end }) {
  const heading = useRef();
  useLayoutEffect(() => {
    if (isOpened) heading.current.focus({ preventScroll: true });
    isOpened = true;
  }, []);
  return (
    <div class="head">
      <div>
        <h1 tabIndex={-1} ref={heading}>
          {children}
        </h1>
        {note && <p class="soft">{note}</p>}
      </div>
      {end && <div class="end">{end}</div>}
    </div>
  );
}
