// A volume: numbers on a grid of voxels along the axes of the world, which are millimetres, RAS: x grows to the
// right, y to the front, z upwards. A voxel at [i, j, k] has its centre at origin + spacing * [i, j, k].

class Volume {
  // entry: {shape, origin, spacing, type, scale, bytes}; bytes are the voxels, z fastest, as gzip in base64
  static async load(entry) {
    const packed = Uint8Array.from(atob(entry.bytes), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const raw = entry.type === "int16" ? new Int16Array(buffer) : new Uint8Array(buffer);
    const empty = entry.type === "int16" ? -32768 : -1; // stands for "no value here"
    return new Volume(entry, Float32Array.from(raw, (value) => (value === empty ? NaN : value * entry.scale)));
  }

  constructor({ shape, origin, spacing }, data) {
    Object.assign(this, { shape, origin, spacing, data });
    this.strides = [shape[1] * shape[2], shape[2], 1];
  }

  // Coordinate along an axis in voxels, for a coordinate in mm.
  along(axis, mm) {
    return (mm - this.origin[axis]) / this.spacing[axis];
  }

  // Number along an axis of the voxel that a coordinate in mm lies in; -1 outside of the grid.
  index(axis, mm) {
    const index = Math.round(this.along(axis, mm));
    return index >= 0 && index < this.shape[axis] ? index : -1;
  }

  // The value of the voxel that a place lies in; NaN where there is none.
  at(place) {
    let position = 0;
    for (let axis = 0; axis < 3; axis++) {
      const index = this.index(axis, place[axis]);
      if (index < 0) return NaN;
      position += index * this.strides[axis];
    }
    return this.data[position];
  }

  // The value between voxel centres; voxels without value weigh nothing, and where the nearest has none, nor has this.
  between(place) {
    if (Number.isNaN(this.at(place))) return NaN;
    const low = [], part = [];
    for (let axis = 0; axis < 3; axis++) {
      const along = this.along(axis, place[axis]);
      low.push(Math.floor(along));
      part.push(along - low[axis]);
    }
    let sum = 0, weights = 0;
    for (let corner = 0; corner < 8; corner++) {
      let weight = 1, position = 0;
      for (let axis = 0; axis < 3; axis++) {
        const high = (corner >> axis) & 1;
        const index = Math.max(0, Math.min(this.shape[axis] - 1, low[axis] + high));
        weight *= high ? part[axis] : 1 - part[axis];
        position += index * this.strides[axis];
      }
      const value = this.data[position];
      if (Number.isNaN(value)) continue;
      sum += weight * value;
      weights += weight;
    }
    return sum / weights;
  }

  // Centre of a voxel in the world.
  place(i, j, k) {
    return [i, j, k].map((index, axis) => this.origin[axis] + this.spacing[axis] * index);
  }
}

// The colours of a quantity: from a value to [red, green, blue], or null where nothing is to be drawn.
// Shares go from 0 to the largest of all experts, so that experts can be compared; years are symmetric about 0.
function colouring(quantity, limit, threshold, palette) {
  if (quantity.kind === "labels") return (value) => (value > 0 ? palette.labels[value - 1] : null);
  const ramp = palette[quantity.kind];
  return (value) => {
    if (!(Math.abs(value) >= threshold)) return null;
    const share = quantity.kind === "diverging" ? (value / limit + 1) / 2 : value / limit;
    return ramp[Math.max(0, Math.min(255, Math.round(share * 255)))];
  };
}
