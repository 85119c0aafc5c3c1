// A list of rows of one height of which only those in sight are in the page.
import { useSignal } from '@preact/signals'
import type { ComponentChildren } from 'preact'
import { useEffect, useLayoutEffect, useRef } from 'preact/hooks'

interface Props {
  count: number
  height: number
  label: string
  class?: string
  follow?: number                       // a row that is to be in sight
  onRange: (first: number, last: number) => void
  head?: ComponentChildren              // stays in sight above the rows
  row: (index: number) => ComponentChildren
}

export function Virtual({ count, height, label, follow, onRange, row, head, class: extra }: Props) {
  const box = useRef<HTMLDivElement>(null)
  const span = useSignal({ top: 0, view: 600 })
  const first = Math.max(0, Math.floor(span.value.top / height) - 6)
  const last = Math.min(count, Math.ceil((span.value.top + span.value.view) / height) + 6)
  const measure = () => { if (box.current) span.value = { top: box.current.scrollTop, view: box.current.clientHeight } }

  useLayoutEffect(() => {
    measure()
    const watch = new ResizeObserver(measure)
    watch.observe(box.current!)
    return () => watch.disconnect()
  }, [])
  useEffect(() => onRange(first, last), [first, last, count])
  useEffect(() => {
    const b = box.current
    if (!b || follow === undefined || follow < 0) return
    const top = follow * height
    if (top < b.scrollTop) b.scrollTop = Math.max(0, top - height)
    else if (top + height > b.scrollTop + b.clientHeight) b.scrollTop = top - b.clientHeight + 2 * height
  }, [follow, count])

  return (
    <div class={`virtual ${extra ?? ''}`} ref={box} onScroll={measure} tabIndex={0} aria-label={label} role="region">
      {head}
      <div class="virtual-all" role="list" style={{ height: `${count * height}px` }}>
        <div class="virtual-part" role="presentation" style={{ transform: `translateY(${first * height}px)` }}>
          {Array.from({ length: Math.max(0, last - first) }, (_, i) => row(first + i))}
        </div>
      </div>
    </div>
  )
}
