"use strict";
// Numbers under the pointer, a finger, or the arrow keys.
const tip = document.getElementById("tip");
const off = new Set(); // runs that are hidden

function format(value, unit) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(2)
    : size >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  return text.replace("-", "−") + (unit ? " " + unit : "");
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, at) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = at; });
  return best;
}

function add(parent, tag, text, color) {
  const element = document.createElement(tag);
  if (color !== undefined) {
    element.className = "c" + color;
    element.append(document.createElement("i"));
  }
  element.append(text);
  parent.append(element);
}

function prepare(svg) {
  const chart = JSON.parse(svg.dataset.chart);
  const [left, right, top, bottom] = chart.box;
  const toX = (x) => left + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * (right - left);
  const toY = (y) => bottom - (y - chart.y[0]) / (chart.y[1] - chart.y[0]) * (bottom - top);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  const lines = () => chart.lines.filter((line) => !off.has(line.r));
  let at = 0; // of the keyboard, in the points of the first line

  function show(x, y) {
    const seen = lines();
    if (!seen.length) return hide();
    let points;
    if (chart.plane) {
      const all = seen.flatMap((line) => line.x.map((_, index) => ({ line, index })));
      const distance = ({ line, index }) => (toX(line.x[index]) - toX(x)) ** 2 + (toY(line.y[index]) - toY(y)) ** 2;
      points = [all.reduce((a, b) => (distance(b) < distance(a) ? b : a))];
    } else {
      const places = seen.map((line) => ({ line, index: nearest(line.x, x) }));
      const first = places.reduce((a, b) => (Math.abs(b.line.x[b.index] - x) < Math.abs(a.line.x[a.index] - x) ? b : a));
      const centre = first.line.x[first.index];
      const slack = (chart.x[1] - chart.x[0]) / 60; // a line that ended before has no number here
      points = places.filter(({ line, index }) => Math.abs(line.x[index] - centre) <= slack);
    }
    const { line, index } = points[0];
    const label = chart.plane ? line.l[index] : chart.label + " " + Math.round(line.x[index]).toLocaleString("en");
    tip.replaceChildren();
    add(tip, "b", label);
    for (const { line, index } of points) {
      let text = line.n + ": " + format(line.y[index], chart.unit);
      if (line.lo) text += " [" + format(line.lo[index]) + ", " + format(line.hi[index]) + "]";
      if (chart.plane) text = line.n + ": skill " + format(line.y[index], "%") + ", retention " + format(line.x[index], "%");
      add(tip, "span", text, line.c);
    }
    const px = toX(line.x[index]), py = toY(line.y[index]);
    cursor.setAttribute("d", chart.plane ? `M${px - 7} ${py}a7 7 0 1 0 14 0a7 7 0 1 0 -14 0` : `M${px} ${top}V${bottom}`);
    cursor.style.fill = "none";
    cursor.style.display = "";
    tip.hidden = false;
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const wanted = box.left + px * scale + 12;
    const fits = wanted + tip.offsetWidth < document.documentElement.clientWidth - 8;
    tip.style.left = Math.max(8, fits ? wanted : box.left + px * scale - tip.offsetWidth - 12) + "px";
    tip.style.top = Math.max(8, box.top + (chart.plane ? py * scale - tip.offsetHeight - 12 : 0)) + "px";
  }

  function hide() {
    tip.hidden = true;
    cursor.style.display = "none";
  }

  function follow(event) {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    show(chart.x[0] + (px - left) / (right - left) * (chart.x[1] - chart.x[0]),
      chart.y[0] + (bottom - py) / (bottom - top) * (chart.y[1] - chart.y[0]));
  }

  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const line = lines()[0];
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") hide();
    if (!(event.key in steps) || !line) return;
    event.preventDefault();
    at = Math.min(line.x.length - 1, Math.max(0, tip.hidden ? (event.key === "End" ? line.x.length - 1 : 0) : at + steps[event.key]));
    show(line.x[at], line.y[at]);
  });
}
document.querySelectorAll("svg[data-chart]").forEach(prepare);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// Runs that are hidden and shown again.
document.querySelectorAll("input[data-run]").forEach((box) => {
  const apply = () => {
    const run = Number(box.dataset.run);
    if (box.checked) off.delete(run); else off.add(run);
    document.querySelectorAll(".run" + run).forEach((element) => element.classList.toggle("off", !box.checked));
  };
  box.addEventListener("change", apply);
  apply(); // a reloaded page keeps its ticks
});

// Tables that are sorted by a column.
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // nothing stands last
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return down ? -order : order;
      };
      [...body.rows].sort((a, b) => compare(value(a), value(b))).forEach((row) => body.append(row));
    });
  });
});

// Answers that are filtered.
const answers = document.getElementById("answers"), more = document.getElementById("more");
if (answers) {
  const few = 6;
  let all = false;
  const apply = () => {
    const kind = document.querySelector("input[name=answers]:checked").value;
    let count = 0;
    for (const card of answers.children) {
      const fits = card.dataset.kinds.split(" ").includes(kind);
      count += fits;
      card.hidden = !fits || (!all && count > few);
    }
    more.hidden = all || count <= few;
    more.textContent = `Show all ${count}`;
  };
  document.querySelectorAll("input[name=answers]").forEach((radio) => radio.addEventListener("change", () => { all = false; apply(); }));
  more.addEventListener("click", () => { all = true; apply(); });
  apply();
}
