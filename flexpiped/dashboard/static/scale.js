// Axes: round ticks, and from values to places. Pure.

/** Return about `count` round ticks from 0 to at least `most`. */
export function ticksTo(most, count) {
  if (!(most > 0)) return [0, 1];
  const rough = most / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let index = 0; ; index += 1) {
    ticks.push(Number((index * step).toPrecision(12)));
    if (index * step >= most) return ticks;
  }
}

/** Return a function from a value in `[low, high]` to a place in `[from, to]`. */
export function linear(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

/** Return runs of neighbouring points that have a number: a gap in the readings is a gap in the line. */
export function runsOf(points, valueOf) {
  const runs = [];
  let run = [];
  for (const point of points) {
    if (typeof valueOf(point) === "number") {
      run.push(point);
    } else if (run.length > 0) {
      runs.push(run);
      run = [];
    }
  }
  return run.length > 0 ? [...runs, run] : runs;
}

/** Return the point nearest in time; undefined of none. */
export function nearest(points, time) {
  let best;
  for (const point of points) {
    if (best === undefined || Math.abs(point.time_unix_s - time) < Math.abs(best.time_unix_s - time)) best = point;
  }
  return best;
}
