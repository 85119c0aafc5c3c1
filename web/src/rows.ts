// The rows of the image list, read in blocks as they come into sight: thousands cost no more than a screenful.
import { effect, signal } from '@preact/signals'
import { api } from './api'
import { itemOf, listVersion, putItem, query, session, study } from './state'

const BLOCK = 60
export const total = signal(0)
export const loaded = signal(0)             // grows with each block that has come
export const listTrouble = signal('')
let ids: (number | undefined)[] = []
let asked = new Set<number>()
let generation = 0

function restart() {
  generation++
  asked = new Set()
  void readBlock(0, true)
}

async function readBlock(block: number, anew = false) {
  if (asked.has(block)) return
  asked.add(block)
  const mine = generation
  try {
    const answer = await api.images(query.value, block * BLOCK, BLOCK)
    if (mine !== generation) return
    if (anew) ids = []
    answer.items.forEach((item, i) => { putItem(item); ids[block * BLOCK + i] = item.id })
    total.value = answer.total
    listTrouble.value = ''
    loaded.value++
  } catch (error) {
    asked.delete(block)
    if (mine === generation) listTrouble.value = (error as Error).message
  }
}

/** Asks for the rows from `first` up to `last`; they are drawn when they come. */
export function want(first: number, last: number): void {
  for (let b = Math.floor(first / BLOCK); b <= Math.floor(Math.max(first, last - 1) / BLOCK); b++) void readBlock(b)
}
export const idAt = (row: number) => ids[row]
export const rowOf = (id: number) => ids.indexOf(id)

/** The id in a row, read from the server where it is not here yet. */
export async function idAtRow(row: number): Promise<number | null> {
  if (row < 0 || row >= total.value) return null
  if (ids[row] === undefined) {
    const answer = await api.images(query.value, row, 1).catch(() => null)
    if (answer?.items[0]) { putItem(answer.items[0]); ids[row] = answer.items[0].id }
  }
  return ids[row] ?? null
}
export const known = (id: number) => itemOf(id).value

let seen = ''
effect(() => {
  const signedIn = Boolean(session.value && (session.value.single || session.value.user) && study.value)
  const now = JSON.stringify([query.value, listVersion.value, session.value?.user?.id, signedIn])
  if (!signedIn || now === seen) return
  seen = now
  queueMicrotask(restart)
})
