// Making and changing what is on the page. Text is only ever set as text, never as markup.

/** An element: h('p', {class: 'muted'}, 'text', child, null). */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === true) element.setAttribute(name, '');
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * Makes `old` look like `next` and keeps every node that can stay, and so the focus, the selection, what was typed and
 * what was scrolled. Handlers are not carried over: the page listens at its root (see `act` in app.js).
 */
export function morph(old, next) {
  if (old.nodeType !== next.nodeType || old.nodeName !== next.nodeName || old.id !== next.id) {
    old.replaceWith(next);
    return next;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return old;
  }
  for (const { name } of [...old.attributes]) if (!next.hasAttribute(name) && name !== 'open') old.removeAttribute(name);
  for (const { name, value } of [...next.attributes]) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const kept = [...old.childNodes];
  const wanted = [...next.childNodes];
  wanted.forEach((child, index) => (kept[index] ? morph(kept[index], child) : old.append(child)));
  kept.slice(wanted.length).forEach((child) => child.remove());
  return old;
}

/** Shows `children` in `place`. */
export function show(place, ...children) {
  const next = place.cloneNode(false);
  next.append(...children.flat(Infinity).filter(Boolean));
  morph(place, next);
}

/** A table. Columns: {label, class, cell(row)}. */
export function table(caption, columns, rows, className = 'stack') {
  return h('div', { class: 'scroll' },
    h('table', { class: className },
      h('caption', { class: 'visually-hidden' }, caption),
      h('thead', {}, h('tr', {}, columns.map((column) => h('th', { scope: 'col', class: column.class }, column.label)))),
      h('tbody', {}, rows.map((row) => h('tr', {}, columns.map((column) =>
        h('td', { class: column.class, 'data-label': column.label }, column.cell(row))))))));
}

export function say(text) {
  document.getElementById('announce').textContent = text;
}

const UNKNOWN = 'unknown';

export function number(value) {
  return value === null || value === undefined ? UNKNOWN : value.toLocaleString('en-US');
}

export function bytes(value) {
  if (value === null || value === undefined) return UNKNOWN;
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return `${unit === 0 || size >= 100 ? Math.round(size) : size.toFixed(1)} ${units[unit]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  const total = Math.round(value);
  const parts = [[Math.floor(total / 86400), 'd'], [Math.floor(total / 3600) % 24, 'h'], [Math.floor(total / 60) % 60, 'min'], [total % 60, 's']];
  const first = parts.findIndex(([count]) => count > 0);
  return parts.slice(first, first + 2).map(([count, unit]) => `${count} ${unit}`).join(' ');
}

export function time(unix) {
  if (!unix) return UNKNOWN;
  const date = new Date(unix * 1000);
  const two = (part) => String(part).padStart(2, '0');
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

const KINDS = { Succeeded: 'good', WaitingForUserAction: 'good', InProgress: 'busy', Failed: 'bad', ValidationFailed: 'bad', Cancelled: '' };
const WORDS = {
  PerformingPreRequisiteSteps: 'Preparing', ValidationInProgress: 'Validating', MigratingData: 'Copying',
  WaitingForCutoverTrigger: 'Ready to cut over', CompletingMigration: 'Cutting over', Completed: 'Completed', RollingBack: 'Rolling back', Cancelling: 'Cancelling',
};

/** State and substate of a migration, as a person says it; the names of the API stand beside it. */
export function pill(migration) {
  const kind = KINDS[migration.state] ?? 'busy';
  const words = migration.state === 'InProgress' || migration.state === 'WaitingForUserAction' ? WORDS[migration.substate] : migration.state;
  return h('span', { class: `pill ${kind}`, title: `${migration.state}, ${migration.substate}` }, words || migration.substate);
}
