// The item that is selected: one thing for the whole page.

const selection = {
  plan: null,
  item: -1,
  listeners: [],

  listen(listener) {
    this.listeners.push(listener);
  },

  // `from` names the part of the page that asked, `tensor` the row that was meant, if any. A tensor that
  // moves with no item has item -1.
  select(plan, item, from, tensor = -1) {
    this.plan = plan;
    this.item = item;
    this.tensor = tensor;
    for (const listener of this.listeners) listener(from);
  },

  clear() {
    this.select(null, -1, "clear");
  },

  get any() {
    return this.plan !== null;
  },

  // The row of the selected item in a plan's table, -1 where it has no such item.
  rowIn(plan) {
    if (this.plan === null) return -1;
    if (plan === this.plan || this.item < 0) return plan === this.plan ? this.item : -1;
    if (plan.fingerprint !== this.plan.fingerprint) return -1;
    const [kind, index] = this.plan.items[this.item];
    return plan.itemRow.get(`${kind}:${index}`) ?? -1;
  },
};
