// Curves as SVG and heat maps as tables, each with its figures in words for those who do not see them.
import { h, newId } from "./dom.js";
import { number, significant, translate } from "./words.js";

const HEIGHT = 280, LEFT = 52, RIGHT = 14, TOP = 12, BOTTOM = 30;
export const COLOURS = 8; // --line-0 to --line-7 in style.css

// Round values that divide a range into about `count` parts.
export function ticks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const result = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) result.push(Number(tick.toPrecision(12)));
  return result;
}

// What is shown of many points: their means over at most `most` stretches.
export function thinned(points, most = 400) {
  if (points.length <= most) return points;
  const size = Math.ceil(points.length / most), result = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    result.push([part[part.length - 1][0], part.reduce((sum, [, y]) => sum + y, 0) / part.length]);
  }
  return result;
}

// Lines: [{ name, points: [[x, y]], colour: 0.., marked: with dots, faint }].
export function lineChart(lines, { steps } = {}) {
  const shown = lines.filter((line) => line.points.length);
  if (!shown.length) return h("p", { class: "faint", t: "before_first_step" });
  // As many units as there are pixels, so that letters keep their size.
  const WIDTH = Math.max(280, Math.min(1100, document.getElementById("main").clientWidth - 80));
  const all = shown.flatMap((line) => thinned(line.points));
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y).sort((a, b) => a - b);
  const x0 = Math.min(0, ...xs), x1 = Math.max(steps ?? 1, ...xs, 1);
  // Leaves the highest hundredth out of the picture, so that a few outliers do not flatten it.
  let y0 = ys[0], y1 = ys[Math.min(ys.length - 1, Math.ceil(ys.length * 0.99))];
  const room = (y1 - y0 || 1) * 0.06;
  y0 -= room; y1 += room;
  const px = (x) => LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
  const py = (y) => TOP + (y1 - Math.min(y, y1)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const svg = h("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", tLabel: ["curve_label", () => ({ summary: summary(shown) })] });
  const levels = ticks(y0, y1, 5);
  const digits = Math.max(0, Math.ceil(-Math.log10(levels[1] - levels[0] || 1) - 1e-9));
  for (const tick of levels) {
    svg.append(h("svg:line", { x1: LEFT, x2: WIDTH - RIGHT, y1: py(tick), y2: py(tick), class: "grid" }),
      h("svg:text", { x: LEFT - 8, y: py(tick) + 4, "text-anchor": "end" }, number(tick, digits)));
  }
  for (const tick of ticks(x0, x1, Math.max(3, WIDTH / 120)).filter(Number.isInteger)) svg.append(h("svg:text", { x: px(tick), y: HEIGHT - 10, "text-anchor": "middle" }, number(tick)));
  svg.append(h("svg:line", { x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis" }));
  for (const line of shown) {
    const points = thinned(line.points);
    const style = `line-${line.colour % COLOURS}${line.faint ? " faint-line" : ""}`;
    if (points.length > 1) svg.append(h("svg:polyline", { points: points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" "), class: style }));
    if (line.marked || points.length === 1) {
      for (const [x, y] of points) svg.append(h("svg:circle", { cx: px(x), cy: py(y), r: 3.5, class: style }, h("svg:title", {}, `${line.name()} · ${translate("step")} ${number(x)}: ${number(y, 4)}`)));
    }
  }
  const legend = h("ul", { class: "legend", "aria-hidden": "true" }, shown.map((line) => h("li", {}, h("span", { class: `swatch line-${line.colour % COLOURS}${line.faint ? " faint-line" : ""}` }), line.name())));
  return h("figure", {}, svg, legend, curveTable(shown));
}

function summary(lines) {
  return lines.map(({ name, points }) => translate("curve_summary", {
    name: name(), first: number(points[0][1], 3), a: number(points[0][0]), last: number(points.at(-1)[1], 3), b: number(points.at(-1)[0]),
  })).join(" ");
}

function curveTable(lines) {
  const details = h("details", { class: "quiet", ontoggle: () => {
    if (!details.open || details.querySelector("table")) return;
    const columns = lines.map((line) => new Map(thinned(line.points, 40)));
    const steps = [...new Set(columns.flatMap((column) => [...column.keys()]))].sort((a, b) => a - b);
    details.append(h("div", { class: "scroll", tabindex: 0, role: "region", tLabel: "as_table" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col", t: "step" }), lines.map((line) => h("th", { scope: "col" }, line.name())))),
      h("tbody", {}, steps.map((step) => h("tr", {}, h("th", { scope: "row" }, number(step)), columns.map((column) => h("td", {}, column.has(step) ? number(column.get(step), 4) : ""))))))));
  } }, h("summary", { t: "as_table" }));
  return details;
}

// Rows and columns with a value, or null, in each cell: a table, whose cells are as dark as their values are large.
export function heatMap({ rows, columns, values, corner, label }) {
  const most = Math.max(...values.flat().filter((value) => value !== null), 1e-30);
  const id = newId("heat");
  const body = rows.map((row, i) => h("tr", {}, h("th", { scope: "row" }, row), columns.map((column, j) => {
    const value = values[i][j];
    if (value === null) return h("td", { class: "void" }, h("span", { class: "hidden", t: "none" }));
    const cell = h("td", { title: `${row} · ${column}: ${significant(value)}` }, h("span", {}, significant(value, 2)));
    cell.style.setProperty("--heat", `${(value / most * 100).toFixed(1)}%`);
    return cell;
  })));
  return h("div", { class: "scroll heat", tabindex: 0, role: "region", "aria-labelledby": id }, h("table", {},
    h("caption", { id, t: label }),
    h("thead", {}, h("tr", {}, h("th", { scope: "col", t: corner }), columns.map((column) => h("th", { scope: "col" }, h("span", {}, column))))),
    h("tbody", {}, body)));
}
