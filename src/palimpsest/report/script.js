"use strict";
// The page's behaviour: the trade-off picture, the table of facts, and what opens for links and for print.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = (id) => (byId(id) ? JSON.parse(byId(id).textContent) : null);
  const paper = matchMedia("print");

  // --- the trade-off picture ---

  const PRINTED_WIDTH = 640;
  const figure = data("trade-off-data");

  // Colours are written "@name" and stand for the style sheet's variable "--name".
  function coloured(value, style) {
    if (typeof value === "string" && value.startsWith("@")) return style.getPropertyValue("--" + value.slice(1)).trim();
    if (Array.isArray(value)) return value.map((inner) => coloured(inner, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner, style)]));
    }
    return value;
  }

  const overlaps = (a, b) =>
    Math.abs(a.x - b.x) < (a.width + b.width) / 2 && Math.abs(a.y - b.y) < (a.height + b.height) / 2;

  // Each label takes the nearest place beside its point that covers no point, interval, path or
  // other label. Where there is none it is left out: hovering and the table still tell the name.
  function placed(labels, traces, layout) {
    const inner = {
      width: layout.width - layout.margin.l - layout.margin.r,
      height: layout.height - layout.margin.t - layout.margin.b,
    };
    const across = (x) => ((x - layout.xaxis.range[0]) / (layout.xaxis.range[1] - layout.xaxis.range[0])) * inner.width;
    const down = (y) => inner.height * (1 - (y - layout.yaxis.range[0]) / (layout.yaxis.range[1] - layout.yaxis.range[0]));
    const between = (left, right, top, bottom) => ({
      x: (left + right) / 2, y: (top + bottom) / 2, width: right - left, height: bottom - top,
    });
    const taken = layout.shapes.map(({ y0 }) => between(0, inner.width, down(y0) - 1, down(y0) + 1));
    for (const { x, y, reach: [[low, high], [bottom, top]] } of labels) {
      taken.push(between(across(x) - 8, across(x) + 8, down(y) - 8, down(y) + 8));
      taken.push(between(across(low), across(high), down(y) - 1, down(y) + 1));
      taken.push(between(across(x) - 1, across(x) + 1, down(top), down(bottom)));
    }
    for (const { x, y, mode } of traces) {
      if (mode === "markers") continue;
      for (let i = 1; i < x.length; i += 1) {
        for (const share of [0, 0.25, 0.5, 0.75]) {
          const [left, top] = [across(x[i] + share * (x[i - 1] - x[i])), down(y[i] + share * (y[i - 1] - y[i]))];
          taken.push(between(left - 1, left + 1, top - 1, top + 1));
        }
      }
    }
    const size = layout.width < 480 ? 11 : 13;
    const annotations = [];
    for (const label of labels) {
      const width = 0.6 * size * label.text.length + 6;
      const height = size + 3;
      const boxAt = ([dx, dy]) => ({ x: across(label.x) + dx, y: down(label.y) + dy, width, height });
      const free = (place) => {
        const box = boxAt(place);
        const inside = box.x > width / 2 && box.x < inner.width - width / 2 && box.y > 8 && box.y < inner.height - 8;
        return inside && !taken.some((other) => overlaps(box, other));
      };
      const places = [];
      for (let far = 12; far < 50; far += 6) {
        for (const side of [1, -1, 0, 0.5, -0.5]) {
          for (const upward of [-1, 1]) places.push([side * (width / 2 + 6), upward * far]);
        }
      }
      const place = places.find(free);
      if (!place) continue;
      taken.push(boxAt(place));
      annotations.push({
        x: label.x, y: label.y, text: label.text, showarrow: false,
        xshift: place[0], yshift: -place[1], xanchor: "center", yanchor: "middle", font: { color: label.color, size },
      });
    }
    return annotations;
  }

  function draw() {
    if (!figure) return;
    const style = getComputedStyle(document.documentElement);
    const { data: traces, layout, labels } = coloured(figure, style);
    const width = paper.matches || printing ? PRINTED_WIDTH : byId("plot").clientWidth;
    const touch = matchMedia("(pointer: coarse)").matches;
    Object.assign(layout, { width, height: Math.max(320, Math.min(520, Math.round(width * 0.56))) });
    layout.font.family = style.getPropertyValue("--sans");
    layout.hoverlabel.font.family = layout.font.family;
    layout.annotations = placed(labels, traces, layout);
    // A finger on the picture scrolls the page; a mouse may draw a box to enlarge.
    if (touch) layout.dragmode = false;
    Plotly.react("plot", traces, layout, { displayModeBar: false, doubleClick: "reset" });
  }

  let printing = false;
  if (figure) {
    draw();
    let drawnAt = byId("plot").clientWidth;
    new ResizeObserver(() => {
      if (byId("plot").clientWidth === drawnAt || printing) return;
      drawnAt = byId("plot").clientWidth;
      draw();
    }).observe(byId("plot"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  // --- fact by fact ---

  const PER_PAGE = matchMedia("(max-width: 46rem)").matches ? 5 : 10;
  const facts = data("facts-data");
  let page = 0;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    if (tag === "td") made.setAttribute("role", "cell");
    return made;
  }

  // Text of any language, in its own direction.
  function words(tag, className, text) {
    const made = element(tag, className, text);
    made.dir = "auto";
    return made;
  }

  function answerCell(row, name) {
    const cell = element("td", "answer");
    cell.dataset.model = name;
    const model = facts.models.indexOf(name);
    const said = row.said[model];
    const probability = row.probability[model];
    if (said === null && probability === null) {
      cell.append(element("span", "absent", "not asked"));
      return cell;
    }
    const right = row.right[model];
    const text = words("span", right ? "said right" : "said", said ?? "");
    if (said === "") text.replaceChildren(element("i", "", "(nothing)"));
    if (right) text.prepend(element("span", "unseen", "correct: "));
    cell.append(text);
    if (probability !== null) {
      const bar = element("span", "bar");
      const fill = element("span", "fill");
      fill.style.width = `${100 * Math.min(probability, 1)}%`;
      bar.append(fill);
      const line = element("span", "probability");
      line.append(bar, element("span", "", probability.toFixed(3)));
      cell.append(line);
    }
    return cell;
  }

  function factRow(row, names) {
    const line = element("tr");
    line.setAttribute("role", "row");
    const head = element("th", "fact");
    head.scope = "row";
    head.setAttribute("role", "rowheader");
    head.append(
      element("span", "role", [row.subject, facts.sets[row.on]].filter(Boolean).join(" · ")),
      words("span", "question", row.question),
      words("span", "truth", row.answer),
    );
    line.append(head, ...names.map((name) => answerCell(row, name)));
    return line;
  }

  function matching(after) {
    const wanted = byId("search").value.trim().toLocaleLowerCase();
    const [on, subject, state] = ["on", "subject", "state"].map((id) => byId(id).value);
    const now = facts.models.indexOf(after);
    const before = facts.models.indexOf(facts.before);
    return facts.rows.filter((row) => {
      if (on && row.on !== on) return false;
      if (subject && row.subject !== subject) return false;
      if (state === "said" && !row.right[now]) return false;
      if (state === "lost" && (row.right[now] || (before >= 0 && !row.right[before]))) return false;
      if (!wanted) return true;
      return [row.subject, row.question, row.answer, ...row.said].some((text) => text && text.toLocaleLowerCase().includes(wanted));
    });
  }

  function showFacts() {
    const after = byId("after").value;
    const rows = matching(after);
    page = Math.min(page, Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1));
    const first = page * PER_PAGE;
    const names = [facts.before, after, facts.gold].filter(Boolean);
    const head = document.querySelector("table.facts thead tr");
    head.replaceChildren(
      ...["Question and true answer", ...names].map((name) => {
        const cell = element("th", "", name);
        cell.scope = "col";
        cell.setAttribute("role", "columnheader");
        return cell;
      }),
    );
    byId("fact-rows").replaceChildren(...rows.slice(first, first + PER_PAGE).map((row) => factRow(row, names)));
    const said = rows.filter((row) => row.right[facts.models.indexOf(after)]).length;
    byId("shown").textContent = rows.length
      ? `${first + 1}–${Math.min(first + PER_PAGE, rows.length)} of ${rows.length} facts; ${after || "the model"} still says ${said} of them.`
      : "No fact fits. Widen the search.";
    byId("previous").disabled = page === 0;
    byId("next").disabled = first + PER_PAGE >= rows.length;
  }

  if (facts) {
    byId("filters").addEventListener("input", () => { page = 0; showFacts(); });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("previous").addEventListener("click", () => { page -= 1; showFacts(); });
    byId("next").addEventListener("click", () => { page += 1; showFacts(); });
    showFacts();
  }

  // --- what opens ---

  function openTarget() {
    const target = byId(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  }
  addEventListener("hashchange", openTarget);
  openTarget();

  let closed = [];
  function toPaper() {
    if (printing) return;
    printing = true;
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
    draw();
  }
  function toScreen() {
    printing = false;
    closed.forEach((details) => { details.open = false; });
    draw();
  }
  addEventListener("beforeprint", toPaper);
  addEventListener("afterprint", toScreen);
  paper.addEventListener("change", () => (paper.matches ? toPaper() : toScreen()));
})();
