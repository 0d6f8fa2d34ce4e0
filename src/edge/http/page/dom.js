// Elements. Text goes in as text and never as markup.

const SVG = 'http://www.w3.org/2000/svg';

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child != null));
  return element;
}

export const get = id => document.getElementById(id);
export const h = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
export const s = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

/** A table in a box that scrolls by itself, and by keyboard. */
export function table(caption, head, rows) {
  const cells = (row, tag) => row.map(cell => (cell instanceof Node && /^T[DH]$/.test(cell.nodeName) ? cell : h(tag, {}, cell)));
  return h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption },
    h('table', {}, h('caption', {}, caption),
      h('thead', {}, h('tr', {}, head.map(cell => (cell instanceof Node ? cell : h('th', { scope: 'col' }, cell))))),
      h('tbody', {}, rows.map(row => h('tr', {}, cells(row, 'td'))))));
}

/** A score as words and as a bar on a scale: the middle is the mean, its box one sigma on either side. */
export function score({ mean, stddev }, [low, high], words) {
  const at = value => (100 * (value - low)) / (high - low);
  const text = stddev == null ? words(mean) : `${words(mean)} ± ${words(stddev)}`;
  const box = stddev == null ? null
    : s('rect', { class: 'sigma', x: at(mean - stddev), y: 4, width: Math.max(at(mean + stddev) - at(mean - stddev), 0.2), height: 16 });
  return [
    h('span', { class: 'number' }, text),
    s('svg', { class: 'bar', viewBox: '0 0 100 24', preserveAspectRatio: 'none', role: 'img', 'aria-label': `${text}, on a scale from ${words(low)} to ${words(high)}` },
      s('line', { class: 'axis', x1: 0, x2: 100, y1: 12, y2: 12, 'vector-effect': 'non-scaling-stroke' }), box,
      s('line', { class: 'mean', x1: at(mean), x2: at(mean), y1: 1, y2: 23, 'vector-effect': 'non-scaling-stroke' })),
  ];
}
