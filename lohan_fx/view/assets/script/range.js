// The stretch of time that lanes and memory show.

const range = {
  full: Math.max(...model.sources.map((source) => source.timeline.step_s), 0) || 1,
  start: 0,
  end: 1,
  listeners: [],

  listen(listener) {
    this.listeners.push(listener);
  },

  set(start, end) {
    const width = Math.min(this.full, Math.max(end - start, this.full * 1e-6));
    const middle = (start + end) / 2;
    const from = Math.max(0, Math.min(middle - width / 2, this.full - width));
    if (from === this.start && from + width === this.end) return;
    this.start = from;
    this.end = from + width;
    for (const listener of this.listeners) listener();
  },

  get width() {
    return this.end - this.start;
  },

  get whole() {
    return this.width >= this.full * 0.999999;
  },

  // Zoom by a factor (below 1: in) so that `at` stays where it is.
  zoom(factor, at = (this.start + this.end) / 2) {
    const width = Math.min(this.full, this.width * factor);
    const start = at - (at - this.start) * (width / this.width);
    this.set(start, start + width);
  },

  pan(seconds) {
    const start = Math.max(0, Math.min(this.start + seconds, this.full - this.width));
    this.set(start, start + this.width);
  },

  reset() {
    this.set(0, this.full);
  },

  // Show [start, end] with some room around it, at a scale where it can be seen.
  reveal(start, end) {
    const length = Math.max(end - start, this.full * 1e-6);
    if (start >= this.start && end <= this.end && length > this.width / 150) return;
    const width = Math.min(this.width, length * 40);
    const middle = (start + end) / 2;
    this.set(
      middle - Math.max(width, length * 1.2) / 2,
      middle + Math.max(width, length * 1.2) / 2,
    );
  },

  text() {
    if (this.whole) return `the whole step, ${secondsText(this.full)}`;
    return `${secondsText(this.start)} to ${secondsText(this.end)} of ${secondsText(this.full)}`;
  },

  // Wheel over a chart: zoom around the pointer, sideways pans. Zooming out of the whole step scrolls.
  wheel(event, share) {
    if (event.ctrlKey || event.metaKey) return;
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (sideways ? this.whole : event.deltaY > 0 && this.whole) return;
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 33 : 1;
    if (sideways) this.pan(((event.deltaX || event.deltaY) * unit * this.width) / 900);
    else
      this.zoom(
        Math.exp(Math.max(-1, Math.min(1, event.deltaY * unit * 0.002))),
        this.start + share * this.width,
      );
  },
};
range.end = range.full;
