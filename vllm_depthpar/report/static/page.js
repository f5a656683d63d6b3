// The plot of a page, and the plan beside it. Everything that is shown as text is made by the
// page itself or set as text; nothing is parsed as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("plot-data").textContent);
  const canvas = document.getElementById("canvas");
  const selected = document.getElementById("selected");
  const axes = { speed: byId("speed"), quality: byId("quality") };
  const REACH = 28; // pixels from a point within which it is meant
  const SYMBOLS = {
    unmodified: d3.symbolStar,
    found: d3.symbolCircle,
    "span of pairs": d3.symbolSquare,
    skipping: d3.symbolTimes,
    compared: d3.symbolTriangle,
    recovered: d3.symbolDiamond,
  };
  let chosen = data.chosen;
  let drawn = []; // of the points that have both values: {at, x, y, point}

  function byId(id) {
    return document.getElementById(id);
  }

  function kindClass(kind) {
    return "kind-" + kind.replaceAll(" ", "-");
  }

  function measures() {
    return {
      speed: data.speed[axes.speed.value],
      quality: data.quality[axes.quality.value],
    };
  }

  function scaleOf(measure, values, range, most) {
    const [low, high] = d3.extent(values);
    const top = Math.min(high, most ?? high);
    const room = (top - low || Math.abs(top) || 1) * 0.06;
    const domain = [low - room, top + room];
    return d3.scaleLinear(domain, range).nice();
  }

  // What lies far above the front would press all else flat: it is drawn at the edge.
  function mostShown(measure, front) {
    if (measure.more || front.length < 2) return undefined;
    const worst = d3.max(front, (one) => one.quality);
    return 2 * worst;
  }

  function draw() {
    const { speed, quality } = measures();
    const width = Math.max(280, canvas.clientWidth);
    const height = Math.min(440, Math.max(300, width * 0.62));
    const margin = { top: 24, right: 16, bottom: 28, left: 48 };
    const front = data.fronts[speed.key + "|" + quality.key];
    const best = new Set(front);
    drawn = data.points.flatMap((point, at) => {
      const x = point.values[speed.key], y = point.values[quality.key];
      return x && y ? [{ at, point, x, y, speed: x.value, quality: y.value }] : [];
    });
    canvas.replaceChildren();
    if (!drawn.length) {
      canvas.textContent = "No plan has both of these measured.";
      return;
    }
    const onFront = drawn.filter((one) => best.has(one.at));
    const most = mostShown(quality, onFront);
    const ends = drawn.flatMap(({ x }) => [x.value, x.low ?? x.value, x.high ?? x.value]);
    const across = [margin.left, width - margin.right];
    const up = [height - margin.bottom, margin.top];
    const x = scaleOf(speed, ends, speed.more ? across : across.toReversed());
    // Down is better, whatever is measured.
    const y = scaleOf(quality, drawn.map((one) => one.quality), quality.more ? up.toReversed() : up, most);
    const edge = y.domain()[1];
    for (const one of drawn) {
      one.beyond = one.quality > edge;
      one.left = x(one.speed);
      one.top = y(Math.min(one.quality, edge));
    }
    drawn.sort((a, b) => a.left - b.left || b.top - a.top);

    const svg = d3.create("svg").attr("viewBox", [0, 0, width, height]);
    svg.append("g").attr("class", "grid").attr("aria-hidden", true)
      .selectAll("line").data(y.ticks(6)).join("line")
      .attr("x1", margin.left).attr("x2", width - margin.right)
      .attr("y1", (tick) => y(tick)).attr("y2", (tick) => y(tick));
    const whole = drawn.every((one) => Number.isInteger(one.speed));
    const ticks = d3.axisBottom(x).ticks(Math.round(width / 90)).tickSizeOuter(0);
    if (whole) ticks.tickValues(x.ticks(Math.round(width / 90)).filter(Number.isInteger));
    svg.append("g").attr("aria-hidden", true)
      .attr("transform", `translate(0,${height - margin.bottom})`).call(ticks);
    svg.append("g").attr("aria-hidden", true)
      .attr("transform", `translate(${margin.left},0)`).call(d3.axisLeft(y).ticks(6).tickSizeOuter(0));

    const line = d3.line((one) => one.left, (one) => one.top);
    svg.append("path").attr("class", "front-path").attr("d", line(drawn.filter((one) => best.has(one.at))));
    const places = new Map(drawn.map((one) => [one.at, one]));
    for (const one of drawn) {
      const before = places.get(one.point.before);
      if (before) {
        svg.append("line").attr("class", "won-back")
          .attr("x1", before.left).attr("y1", before.top).attr("x2", one.left).attr("y2", one.top);
      }
      if (one.x.low != null) {
        svg.append("line").attr("class", "spread " + kindClass(one.point.kind))
          .attr("x1", x(one.x.low)).attr("x2", x(one.x.high)).attr("y1", one.top).attr("y2", one.top);
      }
    }
    const size = (one) => (best.has(one.at) || one.point.kind !== "found" ? 90 : 36);
    // The best known are drawn last, above the others.
    const order = d3.sort(drawn, (one) => best.has(one.at) + (one.at === chosen));
    svg.append("g").attr("role", "group").attr("aria-label", "plans")
      .selectAll("path").data(order).join("path")
      .attr("class", (one) => ["dot", kindClass(one.point.kind), best.has(one.at) ? "best" : "", one.beyond ? "beyond" : ""].join(" "))
      .attr("d", (one) => d3.symbol(SYMBOLS[one.point.kind], size(one))())
      .attr("transform", (one) => `translate(${one.left},${one.top})`)
      .attr("data-point", (one) => one.at)
      .attr("role", "button")
      .attr("aria-label", (one) => `${one.point.label}, ${one.point.kind}; ${quality.title} ${one.y.text}; ${speed.title} ${one.x.text}`)
      .on("focus", (_, one) => point(one))
      .on("blur", () => point(null))
      .on("keydown", key)
      .on("click", (_, one) => choose(one.at)); // of screen readers
    svg.append("circle").attr("class", "ring").attr("r", 10);
    const over = drawn.filter((one) => one.beyond).length;
    if (over) {
      svg.append("text").attr("x", width - margin.right).attr("y", 12).attr("text-anchor", "end")
        .text(`${over} beyond ${d3.format(".2~f")(edge)}, at the edge`);
    }
    svg.on("pointermove", (event) => point(nearest(event)))
      .on("pointerleave", () => point(null))
      .on("click", (event) => {
        const one = nearest(event);
        if (one) choose(one.at);
      });
    canvas.append(svg.node());
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    canvas.append(tip);
    mark();
  }

  function nearest(event) {
    const [left, top] = d3.pointer(event, canvas.querySelector("svg"));
    const one = d3.least(drawn, (each) => Math.hypot(each.left - left, each.top - top));
    return one && Math.hypot(one.left - left, one.top - top) <= REACH ? one : null;
  }

  // Shows what a point is while the pointer or the focus is on it.
  function point(one) {
    const tip = canvas.querySelector(".tip");
    tip.hidden = !one;
    for (const dot of canvas.querySelectorAll(".dot")) {
      dot.classList.toggle("near", !!one && Number(dot.dataset.point) === one.at);
    }
    if (!one) return;
    const { speed, quality } = measures();
    const rows = [
      ["b", one.point.label],
      ["span", one.point.kind],
      ["span", `${quality.title}: ${one.y.text}`],
      ["span", `${speed.title}: ${one.x.text}`],
    ];
    tip.replaceChildren(...rows.map(([tag, text]) => {
      const row = document.createElement(tag);
      row.textContent = text;
      return row;
    }));
    const scale = canvas.clientWidth / canvas.querySelector("svg").viewBox.baseVal.width;
    const left = Math.min(one.left * scale + 14, canvas.clientWidth - tip.offsetWidth);
    const below = one.top * scale + 14;
    const above = one.top * scale - tip.offsetHeight - 14;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${above < 0 ? below : above}px`;
  }

  function key(event, one) {
    const at = drawn.indexOf(one);
    const next = {
      ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1,
      Home: 0, End: drawn.length - 1,
    }[event.key];
    if (next !== undefined) {
      drawn[next] && dotOf(drawn[next].at).focus();
    } else if (event.key === "Enter" || event.key === " ") {
      choose(one.at);
    } else {
      return;
    }
    event.preventDefault();
  }

  function dotOf(at) {
    return canvas.querySelector(`.dot[data-point="${at}"]`);
  }

  function choose(at) {
    chosen = at;
    const plan = byId(`plan-${at}`);
    const title = document.createElement("h3");
    title.append(...[...plan.querySelector("summary").childNodes].map((node) => node.cloneNode(true)));
    selected.className = kindClass(data.points[at].kind);
    selected.replaceChildren(title, plan.querySelector(".about").cloneNode(true));
    mark();
  }

  // Marks the chosen plan in the plot and in the tables; it is what Tab goes to.
  function mark() {
    const place = drawn.find((one) => one.at === chosen);
    const first = place ?? drawn[0];
    for (const dot of canvas.querySelectorAll(".dot")) {
      const at = Number(dot.dataset.point);
      dot.setAttribute("tabindex", first && at === first.at ? 0 : -1);
      dot.setAttribute("aria-pressed", at === chosen);
    }
    const ring = canvas.querySelector(".ring");
    if (ring) {
      ring.style.display = place ? "" : "none";
      if (place) ring.setAttribute("transform", `translate(${place.left},${place.top})`);
    }
    for (const row of document.querySelectorAll("tr[data-point]")) {
      if (Number(row.dataset.point) === chosen) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#plan-"]');
    if (!link) return;
    event.preventDefault();
    choose(Number(link.hash.slice("#plan-".length)));
    byId("plot").scrollIntoView({ block: "start" });
  });
  axes.speed.addEventListener("change", draw);
  axes.quality.addEventListener("change", draw);
  // The plan beside the plot takes the place of the list of all.
  byId("plans").hidden = true;
  let width = 0;
  new ResizeObserver(() => {
    if (canvas.clientWidth !== width) {
      width = canvas.clientWidth;
      draw();
    }
  }).observe(canvas);
  if (chosen === null) chosen = data.fronts[`${data.speed[0].key}|${data.quality[0].key}`].at(-1) ?? 0;
  choose(chosen);
})();
